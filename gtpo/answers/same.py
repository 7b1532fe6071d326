"""Decides whether two answers are the same."""

import re
from fractions import Fraction
from itertools import accumulate

from gtpo.answers.text import boxed_answer
from gtpo.answers.verifier import equal_expressions

LONGEST_ANSWER = 600  # characters; the longest answer in MATH has 159

_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_QUOTIENT = rf"(?:(\d+) )?([+-]?{_DECIMAL}) ?/ ?({_DECIMAL})"
_NUMBER = re.compile(rf"([+-]?) ?(?:{_QUOTIENT}|([+-]?{_DECIMAL})(?:[eE]([+-]?\d{{1,3}}))?)")
_SCIENTIFIC = re.compile(r" ?(?:\\times|\\cdot|[*x]) ?10 ?\^ ?\{?([+-]?\d{1,3})\}?$")
_IN_BASE = re.compile(r"([-\d][\dA-Z.]*)_\{?\d+\}?")
_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z(][A-Za-z ,.'()-]*")
# x_1, f(3), a+b, \theta
_NAME = re.compile(r"(?!\\pi$)[^\d,;=<>]*[A-Za-z][^\d,;=<>]*(?:_\{?\w+\}?)?(?:\([^()=]*\))?")
# What may stand beside digits in an answer whose value is a number. Of anything else math-verify
# takes a part: 7 \cup 5 for 7.
_CALCULATION = re.compile(
    r"(?!.*(?:\.\.|[\d})] ?\|"
    r" ?-?[\d\\]))(?:[\d\s+*/^!|(){}\[\].,:_-]|\\[{}|]|\be\b|(?:\\|\b)(?:frac|sqrt|cdot|"
    r"times|div|pi|infty|ln|log|exp|sin|cos|tan|sec|csc|cot|arc(?:sin|cos|tan)|binom|[lr](?:floor|ceil|vert)|max|min|"
    r"gcd|lcm|[pb]?mod)(?![A-Za-z]))*"
)
_UNIT = re.compile(r"(?:(?<=[\d})])|(?<=\\pi))( ?)([A-Za-z][A-Za-z ./'-]*)(?:\^ ?\{?[23]\}?)?$")
_SHORT_UNITS = frozenset(
    "mm cm km kg mg gm lb lbs oz ft in yd mi hr hrs min sec ml mph kph am pm sq usd".split()
)
_NO_UNITS = frozenset(
    "and times over plus minus divided squared cubed factorial choose mod half halves third thirds"
    " quarter quarters fourths fifths sixths eighths tenths hundredths hundred trillion dozen"
    " dozens score gross".split()
)
# Towers, huge powers, huge factorials, deep nesting. And what math-verify misreads: numbers side by
# side or with a word between
# them (0 to 5 is no product), times of day, text with formulas in it.
_MONSTER = re.compile(
    r"\^[\s{(-]*\d+[\s{(]*\^|\^[\s{(-]*\d{6}|\d{5}\s*!|!\s*!|(?:[^(]*\(){20}|\d \d|\d ?: ?\d\d"
    r"|(?:(?<!_)\{[^{}]*\d\}|\d\)) \.?\d|\}\{[^{}]*\d\}\.?\d"
    r"|[\d.)}] (?!and |or )[A-Za-z]{2,} [-({\\]*[\d.]|\\(?:text|mbox|mathrm)"
)


def same_answer(answer: str | None, reference: str | None) -> bool:
    r"""Whether an answer says what the reference says: values are compared, not strings, and
    exactly.

    - Plain numbers (1,200; .5; 1/2; 1\frac12; 1.5 \times 10^3; 2 million) are compared as
    fractions: 0.333 is not 1/3.
      Commas and spaces separate thousands only where all groups have three digits.
    - A unit, currency, degree or percent sign may be missing on one side. Where both sides name one
    it must be the same
      word or an abbreviation of it. So 50% is 50, and is not 0.5.
    - 12_5 answers 12_5, and so does 12, since the problem named the base; 12_5 does not answer 12.
    - x = 5 answers 5, and so does x = 10/2 = 5; an equation with a number that is not the
    reference, 4 = 5, does not.
    - Of one box in a sentence the content counts; several boxes are no answer. Case does not matter
    in words.
    - The rest is for math-verify, with decimals made exact: (1, 2) is ordered, {1, 2} is not. What
    it
      cannot decide within its limits, or what is too long or monstrous to try, is not the same.

    An empty reference matches nothing.
    """
    answer, reference = (answer or "").strip(), (reference or "").strip()
    if max(len(answer), len(reference)) > LONGEST_ANSWER:
        return answer == reference
    answer, reference = _tidy(answer), _tidy(reference)
    if not answer or not reference:
        return False
    if _squashed(answer) == _squashed(reference):
        return True
    if (
        "=" in answer
        and "=" not in reference
        and (verdict := _equation(answer, reference)) is not None
    ):
        return verdict
    (answer, answer_unit), (reference, reference_unit) = _split_unit(answer), _split_unit(reference)
    if not _same_unit(answer_unit, reference_unit):
        return False
    value, reference_value = _number(answer), _number(reference)
    if value is not None and reference_value is not None:
        return value == reference_value
    if _squashed(answer) == _squashed(reference):
        return True
    if _IN_BASE.fullmatch(answer) or _IN_BASE.fullmatch(reference):
        return _squashed(answer) == _IN_BASE.sub(r"\1", reference) != reference
    if _WORDS.fullmatch(answer) and _WORDS.fullmatch(reference):
        return False
    if reference_value is not None and not _CALCULATION.fullmatch(answer):
        return False
    expressions = _expression(answer, value), _expression(reference, reference_value)
    return all(expressions) and equal_expressions(*expressions)


def _tidy(text: str) -> str:
    """The text in one spelling; of a box the content, of several nothing."""
    if boxes := len(re.findall(r"\\(?:boxed|fbox)(?![A-Za-z])", text)):
        text = boxed_answer(text) if boxes == 1 else ""
    return one_spelling(text)


def _equation(answer: str, reference: str) -> bool | None:
    """Whether `x = 18` answers 18, which 17 = 18 does not: each side that is no mere name must;
    None if there is none.
    """
    if "==" in answer:  # no equation, and each sign of a long row would be a side of its own
        return False
    sides = [side.strip() for side in re.split(r"(?<![<>!:\\])=", answer)]
    claims = [side for side in sides if not _NAME.fullmatch(side)] if len(sides) > 1 else []
    return all(same_answer(side, reference) for side in claims) if claims else None


def _squashed(text: str) -> str:
    """The text without the spaces and braces that mean nothing, and without case where it is
    words.
    """
    text = re.sub(r"([_^])\{(\w+)\}", r"\1\2", text)
    text = re.sub(
        r"(?<![A-Za-z\d]) | (?![A-Za-z\d])|(?<=\d) (?=[A-Za-z])|(?<=[A-Za-z]) (?=\d)", "", text
    )
    return text.strip("().").casefold() if _WORDS.fullmatch(text) else text


def _split_unit(text: str) -> tuple[str, str]:
    """An answer without its unit, and the unit as lower-case letters, "" where none is named."""
    if not (match := _UNIT.search(text)):
        return text, ""
    space, unit = match[1], match[2].replace(".", "").lower()
    first = re.split(r"[ /'-]", unit)[0]
    if first not in _SHORT_UNITS and (
        not space or first in _NO_UNITS or len(first) < 3 and first not in "mgshl"
    ):
        return text, ""
    unit = re.sub(r"\b(?:square|sq|cubic|cu)\b|[^a-z]", "", unit)
    return text[: match.start()], {"lb": "pounds", "lbs": "pounds", "usd": "dollars"}.get(
        unit, unit
    )


def _same_unit(one: str, other: str) -> bool:
    """Whether one unit is the other or abbreviates it: same first letter, letters in order; "" goes
    with any.
    """
    letters = iter(max(one, other, key=len))
    return (
        not one
        or not other
        or one[0] == other[0]
        and all(letter in letters for letter in min(one, other, key=len))
    )


def _number(text: str) -> Fraction | None:
    text = re.sub(
        r"\\frac ?\{ ?([^{}]*) ?\} ?\{ ?([^{}]*) ?\}", r" \1/\2 ", _SCIENTIFIC.sub(r"e\1", text)
    )
    match = _NUMBER.fullmatch(" ".join(text.split()))
    if not match:
        return None
    sign, whole, top, bottom, decimal, exponent = (
        re.sub("[, ]", "", group or "") for group in match.groups()
    )
    if bottom and Fraction(bottom) == 0:
        return None
    value = (
        Fraction(f"{decimal}e{exponent or 0}")
        if decimal
        else int(whole or 0) + Fraction(top) / Fraction(bottom)
    )
    return -value if sign == "-" else value


def _expression(text: str, value: Fraction | None) -> str:
    r"""The text as math-verify gets it: exact, as it rounds decimals; "" for monsters and what
    would leave \boxed{}.
    """
    if value is not None:
        return str(value)
    levels = [
        0,
        *accumulate((token == "{") - (token == "}") for token in re.findall(r"\\.|[{}]", text)),
    ]
    if levels[-1] or min(levels) < 0 or max(levels) > 20 or _MONSTER.search(text):
        return ""
    return re.sub(r"(?<![\d.])\d*\.\d+(?![\d.])", lambda decimal: f"({Fraction(decimal[0])})", text)


_SIGNS = {"%": "percent", "$": "dollars", "€": "euros", "£": "pounds", "¥": "yen"}
_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\uff0d", "-"),
        **dict.fromkeys("\u200b\u2060\ufeff"),
        "½": " 1/2",
        "×": r"\times ",
        "·": r"\cdot ",
        "÷": "/",
        "±": r"\pm ",
        "≈": r"\approx ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "π": r"\pi ",
        "√": r"\sqrt ",
        "∞": r"\infty ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "°": r"^\circ ",
        "²": "^2",
        "³": "^3",
    }
)
_SPELLINGS = [
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        (r"\s*(?<!\\)\\!\s*|\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
        (r"(?<!\\)(?:\\[,;:()\[\]\s]|~|\$)|\\q?quad(?![A-Za-z])|\s+", " "),
        (r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm) ?\{([^{}]*)\}", r" \1 "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\?sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|log|ln|infty)(?![A-Za-z])", r"\\\1"),
        (r"\\frac ?(\d|\\pi) ?(?=[\d{])", r"\\frac{\1}"),
        (r"\\frac ?(\{[^{}]*\}) ?(\d)", r"\\frac\1{\2}"),
        (r"\{ ?, ?\}", ","),
        (r" +", " "),
        (r"^[ *`]*(?:(?:=|\\approx|about) ?)?|[ *`.,;:]+$", ""),
        (
            r"(?<=\d) (thousand|million|billion)(?!\w)",
            lambda m: {"t": "e3", "m": "e6", "b": "e9"}[m[1][0]],
        ),
        (
            r"^([+-]?) ?(?:US)?\\?([$€£¥]) ?([+-]?[\d.][\d., e]*)",
            lambda m: f"{m[1]}{m[3]} {_SIGNS[m[2]]} ",
        ),
        (r" ?\\?([$€£¥%])$", lambda m: f" {_SIGNS[m[1]]}"),
        (r" ?\^ ?\{? ?\\(?:circ|degree) ?\}?(?= ?[A-Za-z.]*$)", " degrees "),
        (r" +(?= |$)", ""),
    )
]


def one_spelling(text: str) -> str:
    text = text.translate(_SYMBOLS)
    if len(re.findall(r"(?<!\\)\$", text)) == 1:  # $18, in contrast to $x + 1$
        text = text.replace("$", r"\$")
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    return text
