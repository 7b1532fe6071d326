"""Whether a merged model computes what its base model and adapter compute, as far as rounding its
weights lets it.

Logits are compared with each row's mean taken off (softmax does not see it); distances are shares
of the adapted model's spread. Before rounding, nothing but float32's arithmetic may tell the two
apart. After it, how far rounding alone moves the logits is measured on the model itself: the
weights that are rounded get moved at random by about as much as rounding moves them. What is left
of the adapter is the projection of the merged model's change on the adapter's: that is what small
updates lose in 16 bits, where they round back to the base.
"""

from typing import Any, NamedTuple

POSITIONS = 64  # of each text, the last ones
ROUNDINGS = 3  # more than three times what rounding does is not rounding
KEPT = 0.8  # less of the adapter's change than this is not the adapter's model any more
ARITHMETIC = 1e-4  # more than float32 sums in another order make; 2e-6 was seen on 24 layers


class Reference(NamedTuple):
    """Centred logits (positions, V) with and without the adapter, each also with weights moved as
    by rounding.
    """

    adapted: Any
    base: Any
    adapted_moved: Any
    base_moved: Any


class Fidelity(NamedTuple):
    """Distances in shares of the spread of the adapted model's logits."""

    effect: float  # of the adapter, from the base model
    rounding: float  # what moving the weights as by rounding does
    difference: float  # of the merged model, from base and adapter
    kept: float  # share of the adapter's change that the merged model has

    def problem(self, dtype: str) -> str | None:
        """Why this is not a faithful merge, as a sentence; None where it is."""
        if not self.difference < float("inf"):
            return f"the merged model's logits are not finite in {dtype}; use --dtype float32"
        if self.difference > ROUNDINGS * self.rounding + ARITHMETIC:
            return (
                "the merged model's logits differ from those of base model and adapter by"
                f" {self.difference:.2%}, and rounding to {dtype} explains {self.rounding:.2%} (the"
                f" adapter makes {self.effect:.2%}): the merge is wrong, so use the adapter itself"
            )
        if self.effect and not self.kept > KEPT:
            return (
                f"{max(self.kept, 0):.0%} of what the adapter changes is left in {dtype}: its"
                " weights are so small that they get lost in rounding; use --dtype"
                f" {'float16 or float32' if dtype == 'bfloat16' else 'float32'}"
            )
        return None

    def __str__(self) -> str:
        if not self.effect:
            return (
                "the adapter changes nothing (it is untrained): the merged model is the base model"
            )
        return (
            f"the adapter changes the logits by {self.effect:.2%} of their spread; the merged model"
            f" has {self.kept:.1%} of that change and differs by {self.difference:.2%} (rounding"
            f" alone: {self.rounding:.2%})"
        )


def reference(model, texts: list, dtype) -> Reference:
    """What `model`, a PeftModel, computes for `texts` (each ids, (1, T)); its weights stay moved as
    by rounding to `dtype`.
    """
    adapted = logits(model, texts)
    with model.disable_adapter():
        base = logits(model, texts)
    _move(model, dtype)
    adapted_moved = logits(model, texts)
    with model.disable_adapter():
        return Reference(adapted, base, adapted_moved, logits(model, texts))


def compare(expected: Reference, model, texts: list) -> Fidelity:
    """How `model`, the merged one, computes `texts`, held against `expected`."""
    merged, spread = logits(model, texts), expected.adapted.norm()

    def distance(other) -> float:
        return ((other - expected.adapted).norm() / spread).item()

    # The direction comes from the moved pair, whose arithmetic errors are not those of the other
    # pair.
    direction = expected.adapted_moved - expected.base_moved
    whole = ((expected.adapted - expected.base) * direction).sum().item()
    kept = ((merged - expected.base) * direction).sum().item() / whole if whole > 0 else 0.0
    return Fidelity(
        distance(expected.base), distance(expected.adapted_moved), distance(merged), kept
    )


def sum_problem(expected: Reference, model, texts: list) -> str | None:
    """Why `model`, merged and still in float32, is not base model and adapter; None where it is.
    Finds one missing layer.
    """
    difference = ((logits(model, texts) - expected.adapted).norm() / expected.adapted.norm()).item()
    if difference <= ARITHMETIC:
        return None
    return (
        "before any rounding, the merged model's logits differ from those of base model and"
        f" adapter by {difference:.2%} of their spread, and float32 explains {ARITHMETIC:.2%}: the"
        " merge is wrong, so use the adapter itself"
    )


def logits(model, texts: list):
    """Centred logits of the last positions of every text, (positions, V), float32 on the CPU."""
    import torch

    model.eval()
    with torch.no_grad():
        rows = torch.cat(
            [model(ids.to(model.device)).logits[0, -POSITIONS:].float().cpu() for ids in texts]
        )
    return rows - rows.mean(-1, keepdim=True)


def _move(model, dtype) -> None:
    """Move one in twelve weights by one part in the precision of `dtype`: the mean square error of
    rounding.
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
        parameter.data.mul_(
            1
            + torch.finfo(dtype).eps
            * ((draw == 0).to(parameter.dtype) - (draw == 1).to(parameter.dtype))
        )
