"""Whether a merged model computes what its base model and adapter compute, up to rounding.

Logits are compared after the mean of each row has been subtracted, since softmax ignores it.
Distances are shares of the spread of the adapted model's logits.

Before the weights are rounded, only the order of float32's sums may make a difference. Afterwards,
the rounding of the weights makes one too, and its size is measured on the model itself. For that,
the weights that get rounded are moved at random, by about as much as rounding moves them.

How much of the adapter is left is the projection of the merged model's change on the adapter's
change. Small updates are lost in 16 bits, where they round back to the base model's weights.
"""

from typing import Any, NamedTuple

POSITIONS = 64  # of each text, the last ones
ROUNDINGS = 3  # a distance of more than three times that of rounding is not rounding
KEPT = 0.8  # the least share of the adapter's change that a merged model must have
# The distance that float32's sums in another order make is smaller; 2e-6 was seen on 24 layers.
ARITHMETIC = 1e-4


class ExpectedLogits(NamedTuple):
    """Centred logits (positions, V) of a model with and without its adapter.

    Each is there a second time, from weights that were moved as by rounding.
    """

    adapted: Any
    base: Any
    adapted_moved: Any
    base_moved: Any


class Fidelity(NamedTuple):
    """How far models are from the adapted model, in shares of the spread of its logits."""

    effect: float  # the base model
    rounding: float  # the adapted model, with weights moved as by rounding
    difference: float  # the merged model
    kept: float  # share of the adapter's change that the merged model has

    def defect(self, dtype: str) -> str | None:
        """Why the merge to `dtype` is not faithful, as a sentence; None if it is."""
        if not self.difference < float("inf"):
            return f"the merged model's logits are not finite in {dtype}; use --dtype float32"
        if self.difference > ROUNDINGS * self.rounding + ARITHMETIC:
            return (
                "the merged model's logits differ from those of base model and adapter by"
                f" {self.difference:.2%}, and rounding to {dtype} explains {self.rounding:.2%} (the"
                f" adapter makes {self.effect:.2%}). The merge is wrong, so use the adapter itself"
            )
        if self.effect and not self.kept > KEPT:
            finer = "float16 or float32" if dtype == "bfloat16" else "float32"
            return (
                f"{max(self.kept, 0):.0%} of what the adapter changes is left in {dtype}: its"
                f" weights are so small that they get lost in rounding; use --dtype {finer}"
            )
        return None

    def __str__(self) -> str:
        if not self.effect:
            return (
                "the adapter changes nothing (it is untrained): the merged model is the base model"
            )
        return (
            f"the merge is faithful. The adapter changes the logits by {self.effect:.2%} of their"
            f" spread; the merged model has {self.kept:.1%} of that change, and differs by"
            f" {self.difference:.2%} ({self.rounding:.2%} from rounding alone)"
        )


def reference_logits(model, texts: list, dtype) -> ExpectedLogits:
    """What the PeftModel `model` computes for `texts`, each token ids of shape (1, T).

    Its weights stay moved afterwards, as by rounding to the torch dtype `dtype`.
    """
    adapted = centred_logits(model, texts)
    with model.disable_adapter():
        base = centred_logits(model, texts)
    _move_weights(model, dtype)
    adapted_moved = centred_logits(model, texts)
    with model.disable_adapter():
        base_moved = centred_logits(model, texts)
    return ExpectedLogits(adapted, base, adapted_moved, base_moved)


def compare(expected: ExpectedLogits, model, texts: list) -> Fidelity:
    """How faithful the merged model `model` is, on `texts`."""
    merged, spread = centred_logits(model, texts), expected.adapted.norm()

    def distance(logits) -> float:
        return ((logits - expected.adapted).norm() / spread).item()

    # The direction is that of the moved pair, because its arithmetic errors are other ones.
    direction = expected.adapted_moved - expected.base_moved
    whole = ((expected.adapted - expected.base) * direction).sum().item()
    merged_part = ((merged - expected.base) * direction).sum().item()
    return Fidelity(
        effect=distance(expected.base),
        rounding=distance(expected.adapted_moved),
        difference=distance(merged),
        kept=merged_part / whole if whole > 0 else 0.0,
    )


def defect_before_rounding(expected: ExpectedLogits, model, texts: list) -> str | None:
    """Why the merged model `model`, still in float32, is not faithful; None if it is.

    One layer that was not merged is enough to be found.
    """
    logits = centred_logits(model, texts)
    difference = ((logits - expected.adapted).norm() / expected.adapted.norm()).item()
    if difference <= ARITHMETIC:
        return None
    return (
        "before any rounding, the merged model's logits differ from those of base model and"
        f" adapter by {difference:.2%} of their spread, and float32 explains {ARITHMETIC:.2%}. The"
        " merge is wrong, so use the adapter itself"
    )


def centred_logits(model, texts: list):
    """Logits of the last positions of every text, minus each row's mean.

    A float32 tensor (positions, V) on the CPU.
    """
    import torch

    model.eval()
    with torch.no_grad():
        rows = torch.cat(
            [model(ids.to(model.device)).logits[0, -POSITIONS:].float().cpu() for ids in texts]
        )
    return rows - rows.mean(-1, keepdim=True)


def _move_weights(model, dtype) -> None:
    """Move one in twelve weights, up or down by one part in the precision of `dtype`.

    That gives the mean square error of rounding to `dtype`. Weights that rounding does not change
    stay as they are, unless an adapter is added to them.
    """
    import torch

    for name, parameter in model.named_parameters():
        adapted = ".base_layer." in name
        if "lora_" in name or not (
            adapted or not torch.equal(parameter.to(dtype).to(parameter.dtype), parameter)
        ):
            continue
        generator = torch.Generator(parameter.device).manual_seed(0)
        draw = torch.randint(
            24, parameter.shape, generator=generator, device=parameter.device, dtype=torch.int8
        )
        sign = (draw == 0).to(parameter.dtype) - (draw == 1).to(parameter.dtype)
        parameter.data.mul_(1 + torch.finfo(dtype).eps * sign)
