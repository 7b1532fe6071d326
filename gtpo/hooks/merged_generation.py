"""Generate with the LoRA adapter merged into the base weights.

The policy is the same, and each layer computes one product per token instead of three. GTPO merges
only where this is exact but for float32 rounding, and where the merged copy is small. Quantised and
half-precision weights are never merged: their merged form is another policy than the trained one.
"""

import contextlib

from gtpo.hooks.seams import wrap

MOST_BYTES = 2**30  # of merged weights, which exist beside the base weights while generating


@contextlib.contextmanager
def merged(model):
    """Yields `model` with its LoRA adapter merged; afterwards the base weights are what they were.

    The base weights get their own memory back, bit for bit. A model that cannot be merged exactly
    stays as it is, and so does a model whose adapter is switched off. Only generate inside: take no
    optimizer step and save nothing.
    """
    import torch

    layers = _mergeable(model)
    base_weights = [layer.get_base_layer().weight for layer in layers]
    originals = [weight.data for weight in base_weights]
    try:
        with torch.no_grad():
            for layer, weight in zip(layers, base_weights, strict=True):
                # peft 0.21.2 merges in place, and its `unmerge` leaves rounding behind.
                weight.data = weight.data.clone()
                layer.merge()
        yield model
    finally:
        for layer, weight, original in zip(layers, base_weights, originals, strict=True):
            weight.data = original
            layer.merged_adapters.clear()


def generate_merged(trainer) -> None:
    """Makes `trainer` generate with its adapter merged; for any `trl.GRPOTrainer`.

    A trainer that generates with vLLM, or whose weights are spread over devices, is left alone.
    """
    if trainer.use_vllm or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return

    def generate_with_merged(generate, *args, **kwargs):
        with merged(trainer.model):
            return generate(*args, **kwargs)

    # trl 1.13.0 calls the model's `generate` here and nowhere else.
    wrap(trainer, "_generate_single_turn", generate_with_merged)


def _mergeable(model) -> list:
    """The LoRA layers of `model` that can be merged exactly; none if they exceed MOST_BYTES."""
    import torch
    from peft.tuners.lora import Linear

    # accelerate 1.15.0 leaves `_original_forward` on a model under autocast, which would round
    # the merged weights.
    if hasattr(model, "_original_forward"):
        return []
    embedding = model.get_input_embeddings().weight

    def is_exact(layer) -> bool:
        weight = layer.get_base_layer().weight
        is_plain_matrix = (
            type(layer) is Linear
            and type(layer.get_base_layer()) is torch.nn.Linear
            and type(weight) is torch.nn.Parameter
            and type(weight.data) is torch.Tensor
            and weight.dtype == torch.float32
            # A shard of FSDP has another shape.
            and weight.shape == (layer.out_features, layer.in_features)
            # A head that shares its weight with the embedding would change the embedding too.
            and weight is not embedding
        )
        return (
            is_plain_matrix
            and not layer.merged
            and not layer.disable_adapters
            and not layer.lora_variant
            and not any(layer.lora_bias.values())
            and all(type(dropout) is torch.nn.Identity for dropout in layer.lora_dropout.values())
        )

    layers = [layer for layer in model.modules() if isinstance(layer, Linear) and is_exact(layer)]
    size = sum(layer.get_base_layer().weight.nbytes for layer in layers)
    return layers if size <= MOST_BYTES else []
