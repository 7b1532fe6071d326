"""The kinds of values that a recipe's keys take, beside numbers and texts."""

import logging
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

logger = logging.getLogger(__name__)

DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[.:][A-Za-z_]\w*")


def listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _first_number(value: Any) -> Any:
    """`8/12` means 8, with a warning."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*(/\s*\d+\s*)+", value):
        first = value.split("/")[0].strip()
        logger.warning(
            "training.num_generations: %r names several numbers; the first, %s, is used",
            value,
            first,
        )
        return first
    return value


def _two_or_more(value: int) -> int:
    if value < 2:
        raise ValueError(f"{value} leaves no group to compare; use 2 or more")
    return value


def _dotted(value: str) -> str:
    if not DOTTED_PATH.fullmatch(value):
        raise ValueError(
            f"{value!r} is no dotted path; use one such as package.module.name or"
            " package.module:name"
        )
    return value


def _variable(name: str) -> str:
    if not name or "=" in name or "\0" in name:
        raise ValueError(
            f"{name!r} cannot be the name of an environment variable; use one such as"
            " CUDA_VISIBLE_DEVICES"
        )
    return name


def _without_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError(
            "the value of an environment variable cannot contain a NUL character; leave it out"
        )
    return value


Texts = Annotated[list[str], BeforeValidator(listed)]
DottedPath = Annotated[str, AfterValidator(_dotted)]
Generations = Annotated[int, BeforeValidator(_first_number), AfterValidator(_two_or_more)]
Trackers = Literal[
    "none", "wandb", "tensorboard", "trackio", "mlflow", "comet_ml", "swanlab", "clearml", "neptune"
]
EnvMap = dict[
    Annotated[str, AfterValidator(_variable)],
    Annotated[
        str,
        BeforeValidator(lambda value: str(value).lower() if isinstance(value, bool) else value),
        AfterValidator(_without_nul),
    ],
]
