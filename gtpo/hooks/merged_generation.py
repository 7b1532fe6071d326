"""Generate with the LoRA adapter merged: the same policy, without the adapter's own small products
at every layer and token.

Only where that is exact but for rounding in float32, and small: never for quantised or
half-precision weights, whose merged form is another policy than the one that trains; nor where a
second copy of the base weights would be large.
"""

import contextlib
import functools

MOST_BYTES = 2**30  # of merged weights, kept beside the base weights while generating


@contextlib.contextmanager
def merged(model):
    """`model` with its LoRA adapter merged into the base weights, which get their own memory back
    afterwards, bit for bit.

    A model that cannot be merged exactly, or whose adapter is switched off, stays as it is. Meant
    for generating: no step may be taken and nothing saved inside.
    """
    import torch

    layers = _mergeable(model)
    base_weights = [layer.get_base_layer().weight for layer in layers]
    originals = [weight.data for weight in base_weights]
    try:
        with torch.no_grad():
            for layer, weight in zip(layers, base_weights, strict=True):
                # peft merges in place, and its unmerging would leave rounding behind
                weight.data = weight.data.clone()
                layer.merge()
        yield model
    finally:
        for layer, weight, original in zip(layers, base_weights, originals, strict=True):
            weight.data = original
            layer.merged_adapters.clear()


def generate_merged(trainer) -> None:
    """Let `trainer`, any `trl.GRPOTrainer` that generates with transformers, do so with its adapter
    merged.
    """
    # trl 1.13.0: the one place where it calls the model's `generate`
    generate = trainer._generate_single_turn
    if trainer.use_vllm or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return

    @functools.wraps(generate)
    def generate_with_merged(*args, **kwargs):
        with merged(trainer.model):
            return generate(*args, **kwargs)

    trainer._generate_single_turn = generate_with_merged


def _mergeable(model) -> list:
    """The LoRA layers of `model` that can be merged; none where they would take more than
    MOST_BYTES.
    """
    import torch
    from peft.tuners.lora import Linear

    # accelerate 1.15.0 wraps it: under autocast, merged weights would be rounded
    if hasattr(model, "_original_forward"):
        return []
    embedding = model.get_input_embeddings().weight

    def exact(layer) -> bool:
        weight = layer.get_base_layer().weight
        return (
            type(layer) is Linear
            and type(layer.get_base_layer()) is torch.nn.Linear
            and type(weight) is torch.nn.Parameter
            and type(weight.data) is torch.Tensor
            and weight.dtype == torch.float32
            # FSDP's shards have other shapes
            and weight.shape == (layer.out_features, layer.in_features)
            and weight is not embedding  # which would be changed as well, where it is the head's
            and not (
                layer.merged
                or layer.disable_adapters
                or layer.lora_variant
                or any(layer.lora_bias.values())
            )
            and all(type(dropout) is torch.nn.Identity for dropout in layer.lora_dropout.values())
        )

    layers = [module for module in model.modules() if isinstance(module, Linear) and exact(module)]
    size = sum(layer.get_base_layer().weight.nbytes for layer in layers)
    return layers if size <= MOST_BYTES else []
