"""What a correct answer is: found in a text, formatted, compared."""

from gtpo.answers.same import GRADING_VERSION, same_answer
from gtpo.answers.text import (
    boxed_answer,
    final_answer,
    format_reference,
    format_score,
    gsm8k_answer,
    reference_answer,
)
from gtpo.answers.verifier import CannotCompare

__all__ = [
    "GRADING_VERSION",
    "CannotCompare",
    "boxed_answer",
    "final_answer",
    "format_reference",
    "format_score",
    "gsm8k_answer",
    "reference_answer",
    "same_answer",
]
