r"""Decides whether two answers are the same: values are compared, not strings.

math-verify (which uses sympy) decides whether two expressions are equal: `\sqrt{8}` and
`2\sqrt{2}`, `(x+1)^2` and `x^2+2x+1`, `[0,\infty)` and `x \ge 0`. Everything else is decided here
first, because math-verify alone is not enough:

- It rounds decimals. Here plain numbers are compared as exact fractions, and the decimals in an
  expression become fractions before math-verify reads them.
- It takes a part of what it cannot read whole: 7 from `7 \cup 5`, 18 from `17 = 18`, 3 from `3c`.
  Here equations, units, bases, words and hedges such as `4 or 5` are told apart first.
- It reads a word as a product of letters, so ECBAD is ABCDE. Here words are compared as words.
- A few characters can keep it busy for ever or use up all memory. Here long answers, towers of
  powers and deep nesting are not the same; the rest runs in a process with limits
  (gtpo.answers.verifier).

TeX, Unicode and English spell one value in many ways, so both answers get one spelling first.
"""

import re
from fractions import Fraction
from itertools import accumulate

from gtpo.answers.text import boxed_answer
from gtpo.answers.verifier import equal_expressions

LONGEST_ANSWER = 600  # characters; the longest answer in MATH has 159


def same_answer(answer: str | None, reference: str | None) -> bool:
    r"""Whether an answer says the same as the reference. An empty reference matches nothing.

    - Plain numbers are compared as fractions, in any spelling: 1,200; .5; 1/2; 1\frac12;
      1.5 \times 10^3; 2 million. So 0.333 is not 1/3. Commas and spaces separate thousands only
      where all groups have three digits.
    - A unit, a currency, a degree or a percent sign may be missing on one side. Where both sides
      have one, it must be the same word or an abbreviation of it. So 50% is 50, and not 0.5.
    - 12_5 answers 12_5. So does 12, because the problem gives the base. 12_5 does not answer 12.
    - x = 5 answers 5, and so does x = 10/2 = 5. An equation with a number that is not the
      reference does not: 4 = 5.
    - Of one box in a sentence the content counts. Several boxes are no answer.
    - Words are compared without case.
    - math-verify compares the rest. So (1, 2) is ordered and {1, 2} is not. What it cannot decide
      within its limits, or what is too long or too complex to try, is not the same.
    """
    answer, reference = (answer or "").strip(), (reference or "").strip()
    if max(len(answer), len(reference)) > LONGEST_ANSWER:
        return answer == reference
    answer, reference = _tidy(answer), _tidy(reference)
    if not answer or not reference:
        return False
    if _squeezed(answer) == _squeezed(reference):
        return True
    if "=" in answer and "=" not in reference:
        same = _equation_answers(answer, reference)
        if same is not None:
            return same
    answer, answer_unit = _split_unit(answer)
    reference, reference_unit = _split_unit(reference)
    if not _same_unit(answer_unit, reference_unit):
        return False
    value, reference_value = _number(answer), _number(reference)
    if value is not None and reference_value is not None:
        return value == reference_value
    if _squeezed(answer) == _squeezed(reference):
        return True
    if _IN_BASE.fullmatch(answer) or _IN_BASE.fullmatch(reference):
        return _squeezed(answer) == _IN_BASE.sub(r"\1", reference) != reference
    if _WORDS.fullmatch(answer) and _WORDS.fullmatch(reference):
        return False
    if reference_value is not None and not _CALCULATION.fullmatch(answer):
        return False
    expressions = _expression(answer, value), _expression(reference, reference_value)
    return all(expressions) and equal_expressions(*expressions)


def _tidy(text: str) -> str:
    """The text in one spelling: of one box the content, of several boxes nothing."""
    if boxes := len(re.findall(r"\\(?:boxed|fbox)(?![A-Za-z])", text)):
        text = boxed_answer(text) if boxes == 1 else ""
    return _one_spelling(text)


# ---- words, equations and bases

_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z(][A-Za-z ,.'()-]*")
_IN_BASE = re.compile(r"([-\d][\dA-Z.]*)_\{?\d+\}?")
# A name on one side of an equation: x_1, f(3), a+b, \theta. But \pi is a number.
_NAME = re.compile(r"(?!\\pi$)[^\d,;=<>]*[A-Za-z][^\d,;=<>]*(?:_\{?\w+\}?)?(?:\([^()=]*\))?")


def _squeezed(text: str) -> str:
    """The text without spaces and braces that mean nothing, and words without case."""
    text = re.sub(r"([_^])\{(\w+)\}", r"\1\2", text)
    text = re.sub(
        r"(?<![A-Za-z\d]) | (?![A-Za-z\d])|(?<=\d) (?=[A-Za-z])|(?<=[A-Za-z]) (?=\d)", "", text
    )
    return text.strip("().").casefold() if _WORDS.fullmatch(text) else text


def _equation_answers(answer: str, reference: str) -> bool | None:
    """Whether each side of an equation that is no mere name is the same as the reference.

    So x = 18 answers 18, and 17 = 18 does not. None where there is no such side.
    """
    if "==" in answer:  # no equation; in a long row each sign would be a side of its own
        return False
    sides = [side.strip() for side in re.split(r"(?<![<>!:\\])=", answer)]
    values = [side for side in sides if not _NAME.fullmatch(side)] if len(sides) > 1 else []
    return all(same_answer(side, reference) for side in values) if values else None


# ---- units

_UNIT = re.compile(r"(?:(?<=[\d})])|(?<=\\pi))( ?)([A-Za-z][A-Za-z ./'-]*)(?:\^ ?\{?[23]\}?)?$")
_SHORT_UNITS = frozenset(
    "mm cm km kg mg gm lb lbs oz ft in yd mi hr hrs min sec ml mph kph am pm sq usd".split()
)
_NO_UNITS = frozenset(
    "and times over plus minus divided squared cubed factorial choose mod half halves third thirds"
    " quarter quarters fourths fifths sixths eighths tenths hundredths hundred trillion dozen"
    " dozens score gross".split()
)
_ALIASES = {"lb": "pounds", "lbs": "pounds", "usd": "dollars"}


def _split_unit(text: str) -> tuple[str, str]:
    """An answer without its unit, and the unit as lower-case letters, "" where it has none."""
    if not (match := _UNIT.search(text)):
        return text, ""
    space, unit = match[1], match[2].replace(".", "").lower()
    first = re.split(r"[ /'-]", unit)[0]
    too_short = len(first) < 3 and first not in "mgshl"
    if first not in _SHORT_UNITS and (not space or first in _NO_UNITS or too_short):
        return text, ""
    unit = re.sub(r"\b(?:square|sq|cubic|cu)\b|[^a-z]", "", unit)
    return text[: match.start()], _ALIASES.get(unit, unit)


def _same_unit(one: str, other: str) -> bool:
    """Whether one unit is the other, abbreviates it, or is missing.

    An abbreviation has the same first letter and letters in the same order.
    """
    if not one or not other:
        return True
    letters = iter(max(one, other, key=len))
    return one[0] == other[0] and all(letter in letters for letter in min(one, other, key=len))


# ---- plain numbers

_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_QUOTIENT = rf"(?:(\d+) )?([+-]?{_DECIMAL}) ?/ ?({_DECIMAL})"
_NUMBER = re.compile(rf"([+-]?) ?(?:{_QUOTIENT}|([+-]?{_DECIMAL})(?:[eE]([+-]?\d{{1,3}}))?)")
_SCIENTIFIC = re.compile(r" ?(?:\\times|\\cdot|[*x]) ?10 ?\^ ?\{?([+-]?\d{1,3})\}?$")
_FRACTION = re.compile(r"\\frac ?\{ ?([^{}]*) ?\} ?\{ ?([^{}]*) ?\}")


def _number(text: str) -> Fraction | None:
    """The exact value of a plain number, None for anything else."""
    text = _FRACTION.sub(r" \1/\2 ", _SCIENTIFIC.sub(r"e\1", text))
    match = _NUMBER.fullmatch(" ".join(text.split()))
    if not match:
        return None
    sign, whole, top, bottom, decimal, exponent = (
        re.sub("[, ]", "", group or "") for group in match.groups()
    )
    if bottom and Fraction(bottom) == 0:
        return None
    if decimal:
        value = Fraction(f"{decimal}e{exponent or 0}")
    else:
        value = int(whole or 0) + Fraction(top) / Fraction(bottom)
    return -value if sign == "-" else value


# ---- expressions for math-verify

# What an answer may consist of whose value is a number. Of anything else math-verify takes a part:
# 7 of 7 \cup 5.
_CALCULATION = re.compile(
    r"(?!.*(?:\.\.|[\d})] ?\| ?-?[\d\\]))"
    r"(?:[\d\s+*/^!|(){}\[\].,:_-]|\\[{}|]|\be\b|(?:\\|\b)(?:frac|sqrt|cdot|times|div|pi|infty"
    r"|ln|log|exp|sin|cos|tan|sec|csc|cot|arc(?:sin|cos|tan)|binom|[lr](?:floor|ceil|vert)|max|min"
    r"|gcd|lcm|[pb]?mod)(?![A-Za-z]))*"
)
# What takes math-verify too long: towers, huge powers, huge factorials, deep nesting. And what it
# misreads: numbers side by side or with a word between them (0 to 5 is no product), times of day,
# text with formulas in it.
_REFUSED = re.compile(
    r"\^[\s{(-]*\d+[\s{(]*\^|\^[\s{(-]*\d{6}|\d{5}\s*!|!\s*!|(?:[^(]*\(){20}|\d \d|\d ?: ?\d\d"
    r"|(?:(?<!_)\{[^{}]*\d\}|\d\)) \.?\d|\}\{[^{}]*\d\}\.?\d"
    r"|[\d.)}] (?!and |or )[A-Za-z]{2,} [-({\\]*[\d.]|\\(?:text|mbox|mathrm)"
)


def _expression(text: str, value: Fraction | None) -> str:
    r"""The text as math-verify gets it, with exact fractions for decimals.

    "" where it is refused, or where its braces would end `\boxed{}` early.
    """
    if value is not None:
        return str(value)
    braces = [(token == "{") - (token == "}") for token in re.findall(r"\\.|[{}]", text)]
    levels = [0, *accumulate(braces)]
    if levels[-1] or min(levels) < 0 or max(levels) > 20 or _REFUSED.search(text):
        return ""
    return re.sub(r"(?<![\d.])\d*\.\d+(?![\d.])", lambda decimal: f"({Fraction(decimal[0])})", text)


# ---- one spelling for what TeX, Unicode and English spell in many ways

_SIGNS = {"%": "percent", "$": "dollars", "€": "euros", "£": "pounds", "¥": "yen"}
_MULTIPLES = {"thousand": "e3", "million": "e6", "billion": "e9"}
_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\uff0d", "-"),
        **dict.fromkeys("\u200b\u2060\ufeff"),  # white space without width
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
# fmt: off
_SPELLINGS = [
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        # spaces, and commands that only change how a formula looks
        (r"\s*(?<!\\)\\!\s*|\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
        (r"(?<!\\)(?:\\[,;:()\[\]\s]|~|\$)|\\q?quad(?![A-Za-z])|\s+", " "),
        (r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm) ?\{([^{}]*)\}", r" \1 "),
        # fractions, roots and functions
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\?sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|log|ln|infty)(?![A-Za-z])", r"\\\1"),
        (r"\\frac ?(\d|\\pi) ?(?=[\d{])", r"\\frac{\1}"),
        (r"\\frac ?(\{[^{}]*\}) ?(\d)", r"\\frac\1{\2}"),
        (r"\{ ?, ?\}", ","),
        (r" +", " "),
        # what stands around an answer
        (r"^[ *`]*(?:(?:=|\\approx|about) ?)?|[ *`.,;:]+$", ""),
        # multiples, currencies, percent and degrees
        (r"(?<=\d) (thousand|million|billion)(?!\w)", lambda match: _MULTIPLES[match[1]]),
        (r"^([+-]?) ?(?:US)?\\?([$€£¥]) ?([+-]?[\d.][\d., e]*)",
         lambda match: f"{match[1]}{match[3]} {_SIGNS[match[2]]} "),
        (r" ?\\?([$€£¥%])$", lambda match: f" {_SIGNS[match[1]]}"),
        (r" ?\^ ?\{? ?\\(?:circ|degree) ?\}?(?= ?[A-Za-z.]*$)", " degrees "),
        (r" +(?= |$)", ""),
    )
]
# fmt: on


def _one_spelling(text: str) -> str:
    """The text with the spellings above, applied in their order."""
    text = text.translate(_SYMBOLS)
    if len(re.findall(r"(?<!\\)\$", text)) == 1:  # $18, in contrast to $x + 1$
        text = text.replace("$", r"\$")
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    return text
