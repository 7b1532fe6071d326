r"""Numbers with their units: `18 dollars`, `$1.2M`, `12 cm^2`, `3 fifths`, `0.\overline{3}`.

A unit may follow a number if it is a known unit, or one noun phrase (`18 red balls`). Words that
change the value change it here (`5 million`, `3 fifths`). A phrase with a word that may change the
value in another way is no unit: a number, a connector, a comparison or a hedge. These are closed
classes of English words, so they can be listed; nouns cannot, and are not.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from gtpo.answers.spelling import CURRENCIES

_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_QUOTIENT = rf"(?:(\d+) )?([+-]?{_DECIMAL}) ?/ ?([+-]?{_DECIMAL})"
_NUMBER = re.compile(rf"([+-]?) ?(?:{_QUOTIENT}|([+-]?{_DECIMAL})(?:[eE]([+-]?\d{{1,3}}))?)")
_SCIENTIFIC = re.compile(r" ?(?:\\times|\\cdot|[*x]) ?10 ?\^ ?\{?([+-]?\d{1,3})\}?$")
_FRACTION = re.compile(r"\\frac ?\{ ?([^{}]*) ?\} ?\{ ?([^{}]*) ?\}")
_REPEATING = re.compile(
    r"([+-]?)(\d*)\.(\d*)(?:\\(?:overline|bar|dot) ?\{ ?(\d+) ?\}|\\(?:bar|dot) ?(\d)|\((\d+)\))"
)
# the same with dots: 0.333..., 0.1666..., 0.2727...
_DOTTED = re.compile(r"([+-]?)(\d*)\.(\d{0,8}?)(?:(\d{1,6}?)\4{2,9}|(\d{2,6}?)\5) ?\.\.\.")
_ORDINAL = re.compile(r"(\d+) ?(?:\^ ?\{? ?)?(st|nd|rd|th) ?\}?")
_ORDINAL_PART = re.compile(r"(\d+ ?/ ?\d+)(?:st|nd|rd|th)s?")  # 2/3rds

_SMALL = "zero one two three four five six seven eight nine ten eleven twelve"
_TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = frozenset(f"{_SMALL} {_TEENS} {_TENS} once twice thrice".split())
_SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "grand": 10**3,
    "lakh": 10**5,
    "million": 10**6,
    "crore": 10**7,
    "billion": 10**9,
    "trillion": 10**12,
    "quadrillion": 10**15,
    "dozen": 12,
    "ten": 10,
    "gross": 144,
    "thou": 10**3,
    "mil": 10**6,
    "bil": 10**9,
    "tril": 10**12,
    "doz": 12,
}
_SHORT_SCALES = {"k": 3, "K": 3, "M": 6, "mn": 6, "mm": 6, "b": 9, "B": 9, "bn": 9, "T": 12}
_DENOMINATORS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fifth": 5, "eighth": 8}
_DENOMINATORS |= {"ninth": 9, "twelfth": 12}
_DENOMINATORS |= {
    f"{word}th": value
    for value, word in enumerate(f"{_SMALL} {_TEENS}".split())
    if value not in (0, 1, 2, 3, 5, 8, 9, 12)
}
_DENOMINATORS |= {
    f"{word[:-1]}ieth": 10 * value for value, word in enumerate(_TENS.split(), start=2)
}
_DENOMINATORS |= {f"{word}th": value for word, value in _SCALES.items() if word not in ("dozen",)}
SCALE_WORDS = frozenset(
    f"{word}{ending}" for word in (*_SCALES, *_DENOMINATORS) for ending in ("", "s")
)
_CONNECTORS = (
    "and or nor but plus minus versus vs than to through until till except without with if unless"
    " while yet when whenever whereas although though lest whether otherwise else"
)
_COMPARISONS = "less fewer below above under over between beyond within least most"
_CALCULATIONS = (
    "squared cubed factorial choose mod modulo added subtracted multiplied divided increased"
    " decreased reduced raised doubled tripled quadrupled quintupled halved negative point score"
    " scores out double triple mille rounded estimated excluded excepted depending assuming"
    " provided"
)
_HEDGES = (
    "not no never none neither either maybe perhaps probably possibly likely roughly approximately"
    " approx about around almost nearly circa guess think unsure instead rather actually wait"
    " unknown undefined is are was were so might could would should must shall cannot aint seem"
    " seems ish sometimes often however few several hmm oops"
)
VALUE_WORDS = frozenset(f"{_CONNECTORS} {_COMPARISONS} {_CALCULATIONS} {_HEDGES}".split())
"""Words that may change the value of a number, beside those for numbers themselves."""

_PREDICATES = frozenset(
    "wrong false incorrect untrue uncertain unclear invalid max maximum minimum tops power fold"
    " inverse reciprocal binary octal hex hexadecimal".split()
)
"""Words that say something of a number if no noun follows them: `5 wrong`, not `5 wrong turns`."""
_NOUNS_IN_LY = frozenset("family supply assembly ally lily fly jelly belly bully july".split())
_TIMES_IN_LY = frozenset("daily hourly weekly monthly quarterly yearly early only".split())
_ADVERB = re.compile(r"[a-z]{3,}ly|wh\w+ever|\w+n['’]t")

# Symbols of units that take a prefix, and the word that each stands for.
_PREFIXES = {"k": "kilo", "c": "centi", "m": "milli", "d": "deci", "M": "mega", "G": "giga"}
_PREFIXES |= {"T": "tera", "n": "nano", "µ": "micro", "u": "micro"}
_PREFIXED = {
    "m": "meter",
    "g": "gram",
    "L": "liter",
    "l": "liter",
    "s": "second",
    "W": "watt",
    "Wh": "watthour",
    "Hz": "hertz",
    "B": "byte",
    "J": "joule",
    "N": "newton",
    "Pa": "pascal",
    "V": "volt",
    "cal": "calorie",
    "mol": "mole",
}
_SYMBOLS = {
    **{
        prefix + symbol: long + word
        for symbol, word in _PREFIXED.items()
        for prefix, long in _PREFIXES.items()
    },
    **{symbol: word for symbol, word in _PREFIXED.items() if symbol != "B"},  # 5 B is 5 billion
    **{"in": "inch", "ft": "foot", "feet": "foot", "yd": "yard", "mi": "mile", "oz": "ounce"},
    **{"lb": "pound", "lbs": "pound", "gm": "gram", "gms": "gram", "cc": "centimeter^3"},
    **{"h": "hour", "hr": "hour", "hrs": "hour", "min": "minute", "mins": "minute"},
    **{"sec": "second", "secs": "second", "yr": "year", "yrs": "year", "wk": "week"},
    **{"wks": "week", "gal": "gallon", "qt": "quart", "pt": "pint", "ac": "acre"},
    **{"mph": "mile/hour", "kph": "kilometer/hour", "kmph": "kilometer/hour", "mpg": "mile/gallon"},
    **{"am": "am", "pm": "pm", "deg": "degree", "rad": "radian", "pct": "percent"},
    **{"usd": "dollar", "eur": "euro", "gbp": "pound", "inr": "rupee", "buck": "dollar"},
    **{"ml": "milliliter", "kwh": "kilowatthour", "gb": "gigabyte", "mb": "megabyte"},
    **{"kb": "kilobyte", "tb": "terabyte", "kgs": "kilogram", "kms": "kilometer"},
    **{"celsius": "celsius", "fahrenheit": "fahrenheit", "C": "celsius", "F": "fahrenheit"},
}
_WORDS = frozenset(
    "degree percent cent dollar euro pound yen rupee hour minute second day week month year"
    " decade century inch foot yard mile acre ounce ton gallon quart pint cup radian celsius"
    " fahrenheit am pm byte unit".split()
) | frozenset(re.split(r"[/^]", word)[0] for word in _SYMBOLS.values())
_LONE_DEGREES = {"C", "F"}  # units after the word degree only

_UNIT = re.compile(
    r"(?P<number>.*(?:[\d)}]|\\pi|\\infty)\.?)(?P<space> ?)"
    r"(?P<phrase>[A-Za-zµ(][A-Za-zµ ./'()-]*?(?: ?\^ ?\{?[23]\}?[A-Za-z ./]*)?)"
)
_CODES = "USD|EUR|GBP|INR|CAD|AUD|JPY|CNY|CHF"
_CURRENCY = "|".join(map(re.escape, CURRENCIES)).replace(r"\$", r"(?:US|A|C)?\\?\$")
_MONEY = re.compile(
    rf"(?P<sign>[+-]? ?)(?:(?P<symbol>{_CURRENCY}|\\textdollar)|(?P<code>{_CODES}|Rs\.?) ) ?"
    r"(?P<rest>[+\-\d.].*)"
)
_MONEY_SCALE = re.compile(rf"({_DECIMAL}) ?(k|K|M|mm|mn|m|b|B|bn|T)")
_SCALED = re.compile(rf"([+-]?{_DECIMAL}) ?(k|K|bn|mn)|([+-]?{_DECIMAL}) (M)")
_SCALED_MONEY = re.compile(
    rf"(?P<sum>[+-]?{_DECIMAL} ?(?:k|K|mm|mn|m|M|bn|b|B|T)) ?"
    rf"(?P<unit>{_CODES}|dollars?|euros?|bucks)"
)
_PER = re.compile(r"(?<=\d) ?/ ?(?=[A-Za-z]{3}|hr|yr)")
_DEGREES = re.compile(r"(.*[\d)}]) ?\^\\circ ?([CF])?")
_SIGN_AFTER = re.compile(rf"(.*\d\)?) ?(?:\\?%|(\\percent)|({_CURRENCY}))")


class Quantity(NamedTuple):
    """An answer as its number and its unit."""

    text: str
    """The answer without its unit."""
    value: Fraction | None
    """Its exact value, where it is a plain number."""
    unit: tuple[str, ...]
    """The unit's words in one form, sorted; () where none is named."""
    says_more: bool
    """Whether words follow the number that are no unit: then the number is not the answer."""


def quantity(text: str) -> Quantity:
    """`text`, in one spelling, as a number or expression and the unit that follows or precedes."""
    if money := _MONEY.fullmatch(text):
        return _money(money)
    if scaled := _SCALED_MONEY.fullmatch(text):
        sign = {"d": r"\$", "b": r"\$", "e": "€"}.get(scaled["unit"][0], scaled["unit"] + " ")
        return quantity(sign + scaled["sum"])
    if sign := _SIGN_AFTER.fullmatch(text):
        currency = CURRENCIES.get((sign[3] or "").lstrip("\\")[-1:], "percent")
        return _with_unit(sign[1], Fraction(1), (_singular(currency),))
    degrees = _DEGREES.fullmatch(text)
    if degrees and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        scale = (_SYMBOLS[degrees[2]],) if degrees[2] else ()
        return _with_unit(degrees[1], Fraction(1), ("degree", *scale))
    if scaled := _SCALED.fullmatch(text):
        power = _SHORT_SCALES[scaled[2] or scaled[4]]
        return _with_unit(scaled[1] or scaled[3], Fraction(10**power), ())
    if match := _UNIT.fullmatch(text):
        meaning = _meaning(match["phrase"], bool(match["space"]))
        if meaning is not None:
            return _with_unit(match["number"], *meaning)
        ordinal, _, noun = match["phrase"].partition(" ")
        rank = number(match["number"] + ordinal)
        if rank is not None and noun and (meaning := _meaning(noun, True)):  # 12th grade
            factor, unit = meaning
            if factor == 1 and noun not in ("root", "power"):
                return Quantity(str(rank), rank, unit, False)
        words = re.findall(r"[A-Za-z]{3,}", match["phrase"])
        return Quantity(text, number(text), (), bool(match["space"]) and bool(words))
    return Quantity(text, number(text), (), False)


def same_unit(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether two units may stand for each other: one is missing, or they are the same.

    Of two noun phrases one may say less: `balls` for `red balls`. Known units must be the same.
    """
    if not one or not other or one == other:
        return True
    if {word for word in one if _is_known(word)} != {word for word in other if _is_known(word)}:
        return False
    return set(one) <= set(other) or set(other) <= set(one)


def number(text: str) -> Fraction | None:
    r"""The exact value of a plain number; None for anything else.

    Plain numbers are 1,200; .5; 1/2; 1\frac12; 1.5 \times 10^3; 1.2e5; 3rd; 0.\overline{3}.
    """
    if repeating := _REPEATING.fullmatch(text) or _DOTTED.fullmatch(text):
        return _repeating(repeating)
    if ordinal := _ORDINAL.fullmatch(text):
        return Fraction(ordinal[1]) if ordinal[2] == _suffix(int(ordinal[1])) else None
    if text.startswith("(") and text.endswith(")") and "," not in text:
        return number(text[1:-1].strip())
    if "/" in text:
        text = re.sub(r"\( ?([+-]?[\d.]+) ?\)", r"\1", text)
        text = _ORDINAL_PART.sub(r"\1", text)
    text = _FRACTION.sub(r" \1/\2 ", _SCIENTIFIC.sub(r"e\1", text))
    match = _NUMBER.fullmatch(" ".join(text.split()))
    if not match:
        return None
    groups = (re.sub("[, ]", "", group or "") for group in match.groups())
    sign, whole, top, bottom, decimal, exponent = groups
    if bottom and Fraction(bottom) == 0:
        return None
    if whole and (top[:1] in "+-" or bottom[:1] in "+-"):
        return None  # 2 -3/4 is a difference
    if decimal:
        value = Fraction(f"{decimal}e{exponent or 0}")
    else:
        value = int(whole or 0) + Fraction(top) / Fraction(bottom)
    return -value if sign == "-" else value


def _repeating(match: re.Match) -> Fraction:
    sign, whole, start, *periods = match.groups("")
    whole, period = whole or "0", "".join(periods)
    value = Fraction(f"{whole}.{start or 0}")
    value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(start))
    return -value if sign == "-" else value


def _suffix(ordinal: int) -> str:
    if ordinal % 100 in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(ordinal % 10, "th")


def _money(match: re.Match) -> Quantity:
    """`$5M`, `$5 hundred`, `$18.00 per day`: the rest is read without the currency."""
    symbol, sign, rest = match["symbol"], match["sign"].strip(), match["rest"]
    rest = _PER.sub(" per ", rest)
    currency = _currency(symbol or match["code"])
    if scaled := _MONEY_SCALE.fullmatch(rest):
        power = {**_SHORT_SCALES, "m": 6}[scaled[2]]
        return _with_unit(sign + scaled[1], Fraction(10**power), (currency,))
    inner = quantity(rest)
    value = -inner.value if sign == "-" and inner.value is not None else inner.value
    unit = tuple(sorted({*inner.unit, currency}))
    return Quantity(sign + inner.text, value, unit, inner.says_more)


def _currency(sign: str) -> str:
    """The unit that a sign or a code before a number stands for."""
    if sign == r"\textdollar":
        return "dollar"
    known = CURRENCIES.get(sign[-1]) or {"Rs": "rupees"}.get(sign.rstrip("."))
    return _singular(known) if known else _SYMBOLS.get(sign.lower(), sign.lower())


def _with_unit(text: str, factor: Fraction, unit: tuple[str, ...]) -> Quantity:
    text = text.strip()
    value = number(text)
    if factor == 1:
        return Quantity(text, value, unit, False)
    if value is None:  # 2\pi thousandths
        return Quantity(text, None, unit, True)
    return Quantity(str(value * factor), value * factor, unit, False)


def _meaning(phrase: str, after_space: bool) -> tuple[Fraction, tuple[str, ...]] | None:
    """The factor and the unit that a phrase after a number stands for; None if it is no unit."""
    phrase = re.sub(r"\(e?s\)", "s", phrase)  # apple(s)
    phrase = re.sub(r"\b([ap])\.m\b\.?", r"\1m", phrase).replace("per cent", "percent")
    phrase = phrase.replace("(", " ").replace(")", " ")
    powers = re.findall(r"\^ ?\{?([23])\}?", phrase)
    words = re.sub(r"\^ ?\{?[23]\}?", " ", phrase).replace(".", " ").split()
    if not words or len(powers) > 1:
        return None
    first = words[0].split("/")[0]
    if not after_space and not _is_symbol(first):
        return None  # 5x, 3c
    if len(first) < 3 and not _is_symbol(first) and (len(words) == 1 or not first.isupper()):
        if first.strip(".") not in ("a", "an", "sq", "cu"):
            return None  # 5 x; but 18 ID cards and $12 a day
    factor, words = _factor(words)
    letters = [part for word in words for part in re.split(r"[/-]", word) if len(part) == 1]
    if any(letter not in "aA" and not _is_symbol(letter) for letter in letters):
        return None  # per n
    if any(_changes_the_value(word, words) for word in words):
        return None
    unit = [part for word in words for part in _one_form(word)]
    if powers and unit:
        unit = [
            f"{part}^{powers[0]}" if i == len(unit) - 1 else part for i, part in enumerate(unit)
        ]
    return factor, tuple(sorted(_below_per(_with_powers(unit))))


def _factor(words: list[str]) -> tuple[Fraction, list[str]]:
    """What the words at the start multiply the number by, and the words that are left."""
    factor = Fraction(1)
    while words:
        word = _singular(words[0].lower())
        if word in _SCALES and (word != "ten" or words[0].lower() == "tens"):
            factor *= _SCALES[word]
        elif word in _DENOMINATORS and (
            len(words) == 1 or words[1].lower() == "of" or words[0].lower().endswith(("hs", "ds"))
        ):
            factor /= _DENOMINATORS[word]
        else:
            break
        words = words[1:]
    if factor != 1 and words and words[0].lower() == "of":
        words = words[1:]
    return factor, words


def _changes_the_value(word: str, words: list[str]) -> bool:
    parts = re.split(r"[-/]", word.lower())
    if word.lower() == "times":  # 5 times; 5 times a day; not 5 times as many
        return len(words) > 1 and words[1].lower() not in ("a", "an", "per", "each", "every")
    last = word is words[-1]
    if last and word.lower() in ("a", "an", "the", "of", "per"):
        return True
    if last and (word.lower() in _PREDICATES or word.lower().endswith("ly") and not _is_noun(word)):
        return True
    return any(
        part in VALUE_WORDS
        or _ADVERB.fullmatch(part)
        and not part.endswith("ly")
        or part in NUMBER_WORDS
        or _singular(part) in _SCALES
        or re.search(r"illion(?:th)?s?$", part)
        or (last and len(parts) == 1 and _singular(part) in _DENOMINATORS)
        for part in parts
    )


def small_number(word: str) -> int | None:
    """The value of a word for a number from 2 to 19; None for another word."""
    words = f"{_SMALL} {_TEENS}".split()
    return words.index(word) if word in words[2:] else None


def _is_noun(word: str) -> bool:
    """Whether a word in -ly may end a noun phrase: `18 family`, `18 daily`, not `18 hopefully`."""
    return word.lower() in _NOUNS_IN_LY | _TIMES_IN_LY


def _one_form(word: str) -> list[str]:
    """The words that a word or symbol of a unit stands for: `km/h` is kilometer, per, hour."""
    parts = []
    for i, part in enumerate(word.split("/")):
        if not part:
            continue
        known = _SYMBOLS.get(part) or _SYMBOLS.get(part.lower()) or _SYMBOLS.get(_singular(part))
        form = known or _singular(part.lower().replace("metre", "meter").replace("litre", "liter"))
        parts += ["per"] * (i > 0) + form.replace("/", " per ").split()
    return [part for part in parts if part not in ("of", "in", "total", "the", "unit")]


def _with_powers(unit: list[str]) -> list[str]:
    """`square`, `sq` and `cubic` as powers of the unit that follows."""
    powers = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
    written, power = [], ""
    for part in unit:
        if part in powers:
            power = powers[part]
        else:
            written.append(part + power)
            power = ""
    return written


def _below_per(unit: list[str]) -> list[str]:
    """The words after `per`, `a` or `an` with a stroke: students, /teacher."""
    per = next((i for i, part in enumerate(unit) if part in ("per", "a", "an")), len(unit))
    below = [part for part in unit[per:] if part not in ("per", "a", "an")]
    return unit[:per] + [f"/{part}" for part in below]


def _is_symbol(word: str) -> bool:
    if word in _LONE_DEGREES:
        return False
    return word in _SYMBOLS or word.lower() in _SYMBOLS and len(word) > 1


def _is_known(word: str) -> bool:
    return word.startswith("/") or word.partition("^")[0] in _WORDS


def _singular(word: str) -> str:
    if word.endswith("'s"):
        return word[:-2]
    if re.search(r"(?:ss|us|is)$", word) or len(word) < 4 or not word.endswith("s"):
        return {"feet": "foot"}.get(word, word)
    if word.endswith("ies"):
        return word[:-3] + "y"
    if re.search(r"(?:s|x|z|ch|sh)es$", word):
        return word[:-2]
    return word[:-1].rstrip("'")
