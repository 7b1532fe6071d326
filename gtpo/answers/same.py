r"""Whether two answers are the same: values are compared, exactly, and not strings.

math-verify (which uses sympy) decides whether two expressions are equal: `\sqrt{8}` and
`2\sqrt{2}`, `(x+1)^2` and `x^2+2x+1`. It runs in a process with limits (verifier.py). Everything
else is decided here first, because math-verify alone is not enough:

- It rounds decimals and drops what follows a number. Numbers and units are compared in quantity.py.
- It takes a part for the whole: 7 from `7 \cup 5`, the last claim of `y = x, y = 3x`, the empty set
  from `[9,3)`. Lists, points, intervals, named parts and claims are compared part by part here.
- It reads a word as a product of letters, so ECBAD is ABCDE. Words are compared as words here.
- A few characters can keep it busy for ever or use up all memory. Long answers, towers of powers
  and deep nesting are not the same.

docs/grading.md is the page for users. GRADING_VERSION grows with every change of a decision.
"""

import re
from fractions import Fraction
from itertools import accumulate

from gtpo.answers.quantity import (
    NUMBER_WORDS,
    SCALE_WORDS,
    VALUE_WORDS,
    Quantity,
    number,
    quantity,
    same_unit,
    small_number,
)
from gtpo.answers.spelling import one_spelling
from gtpo.answers.text import boxed_answers
from gtpo.answers.verifier import equal_expressions, nearly_equal

GRADING_VERSION = 2
"""The version of these rules. It grows when an answer is decided in another way than before."""

LONGEST_ANSWER = 600  # characters; the longest answer in MATH has 159

_PLAIN = re.compile(r"-?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?")
_FRAMES = (
    re.compile(
        r"(?:(?:so|thus|hence|therefore),? )?(?:(?:the|my) )?(?:final |correct )?"
        r"(?:answer|result|solution) ?(?:is ?:?|:|=) ?(.+)",
        re.IGNORECASE,
    ),
    re.compile(r"(.+) is the (?:final |correct )?answer", re.IGNORECASE),
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
# Signs and words beside a box that change the value of what is in it.
_CHANGES = "|".join(
    sorted((VALUE_WORDS | NUMBER_WORDS | SCALE_WORDS) - set("is are was were so if to".split()))
)
_BEFORE_BOX = (
    r"[-−–+*/^_!√~<>≤≥≠±≈\d(|]|\d,|\S\.|\}\{[^{}]*\}"
    r"|\\(?:log|ln|sin|cos|tan|neq?|not|cdot|times|[lg]eq?|pm|approx|sim|neg)"
    r"|\\(?:sqrt|frac|binom|bar|overline|x?cancel) ?(?:\[\d\])?(?:\{[^{}]*\})?\{[^{}]*"
    rf"|\b(?:{_CHANGES})"
)
_AFTER_BOX = (
    r"[-−–+*/^_!?%√~<>≤≥≠±\d²³|]|\.\d|, ?(?:-?\d|not?\b)|[A-Za-z](?![A-Za-z])"
    r"|\\(?:%|cdot|times|pi|sqrt|frac|pm|ne)"
    rf"|(?:\\text ?\{{)? ?(?:{_CHANGES})(?![A-Za-z])"
)
_TOUCHED = re.compile(
    rf"(?:{_BEFORE_BOX}) ?\\(?:boxed|fbox)(?![A-Za-z])"
    rf"|\\(?:boxed|fbox) ?\{{[^{{}}]*\}} ?(?:{_AFTER_BOX})",
    re.IGNORECASE,
)
_IN_BASE = re.compile(r"\(?([-\d][\dA-Za-z.]*)\)?_ ?\{? ?\d+ ?\}?")
_BASE_IN_WORDS = re.compile(
    r"\(?(\d[\dA-Za-z.]*)\)? ?(?:_ ?[{( ]*|,? ?\(?(?:in )?base[- ])(\d+|[A-Za-z]{3,})[)} ]*"
)
_INDEXED_NUMBER = re.compile(r"[\d)}]_(?!\{? ?\{)")  # math-verify drops the index of a number
_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z(][A-Za-z ,.'()-]*")
_CHOICE = re.compile(r"\(?([A-Z])[).:]?\)?")
_SEPARATORS = re.compile(r" ?(?:[,;]|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])) ?")
_PAIRS = {"(": ")", "[": "]", "{": "}"}
# x_1, f(3), a+b, \theta, \overline{AB}, P(win)
_NAME = re.compile(
    r"(?!\\(?:pi|infty) ?$|i$|e$)[^\d,;=<>]*[A-Za-z][^\d,;=<>]*(?:_ ?\{?\w+\}?)?(?:\([^()=]*\))?"
)
_TUPLE_OF_NAMES = re.compile(r"\( ?[A-Za-z](?:_\{?\w\}?)?(?: ?, ?[A-Za-z](?:_\{?\w\}?)?)+ ?\)")
_EQUALS = re.compile(r"(?<![<>!:\\=])=(?!=)")
_TIME = re.compile(r"0?(\d{1,2}) ?: ?(\d\d)(?: ?: ?(\d\d))? ?([ap]\.? ?m\.?)?", re.IGNORECASE)
_RATIO_IN_WORDS = re.compile(r"(\d+(?:\.\d+)?) to (\d+(?:\.\d+)?)((?: to \d+(?:\.\d+)?)*)")
_R = r"\\mathbb ?\{? ?R ?\}?"
_REALS = re.compile(rf"{_R}|(?:all )?real(?:s| numbers)", re.IGNORECASE)
# \mathbb{R} \setminus \{3\}, all real numbers except 3, x \in \mathbb{R}, x \ne 3
_WITHOUT = re.compile(
    rf"(?:[a-z] ?\\in ?)?{_R} ?(?:-|\\setminus|\\backslash) ?\\?\{{ ?([^{{}},]+?) ?\\?\}}"
    r"|all real(?:s| numbers) except (?:for )?(?:[a-z] ?= ?)?([^ ,]+)"
    rf"|([a-z]) ?\\in ?{_R} ?,? ?(?:and )?\3 ?\\ne ?([^ ,]+)"
)
_SET_BUILDER = re.compile(
    rf"(?:\\\{{)? ?([a-z]) ?(?:\\in ?{_R} ?)?(?:\\mid|\||:|\\colon) ?(.+?) ?(?:\\\}})?"
)
_COMPARISON = re.compile(r" ?(<|>|\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])) ?")
# A sum, difference or product of plain numbers is a calculation that was not carried out.
_UNCOMPUTED = re.compile(r"[+-]?\d+(?:\.\d+)?(?:(?:[+*-]|\\times|\\cdot)[+-]?\d+(?:\.\d+)?)+")
# What may stand beside digits in an answer whose value is a number. Of anything else math-verify
# takes a part: 7 \cup 5 for 7.
_FUNCTIONS = (
    "frac|sqrt|cdot|times|div|pi|infty|ln|log|exp|sin|cos|tan|sec|csc|cot|arc(?:sin|cos|tan)|"
    "binom|[lr](?:floor|ceil|vert)|max|min|gcd|lcm|[pb]?mod|circ|pm"
)
_CALCULATION = re.compile(
    r"(?!.*(?:\.\.|[\d})] ?\| ?-?[\d\\]))"
    r"(?:[\d\s+*/^!|(){}\[\].,:-]|\\log_|\\[{}|]|\be\b|\bi\b|"
    rf"(?:\\|\b)(?:{_FUNCTIONS})(?![A-Za-z]))*"
)
# Towers, huge powers, huge factorials, deep nesting. And what math-verify misreads: numbers side by
# side, times of day, text with formulas in it. It takes 0 to 5 for a product.
_MONSTER = re.compile(
    r"\^[\s{(-]*\d+[\s{(]*\^|\^[\s{(-]*\d{6}|\d{5}\s*!|!\s*!|(?:[^(]*\(){20}|\d \d|\d ?: ?\d\d"
    r"|(?:(?<!_)\{[^{}]*\d\}|\d\)) \.?\d|\}\{[^{}]*\d\}\.?\d"
    r"|[\d.)}] (?!and |or )[A-Za-z]{2,} [-({\\]*[\d.]|\\(?:text|mbox|mathrm)"
)
_TRIGONOMETRIC = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc)) ?[({]? ?(\d+(?:\.\d+)?) ?\^ ?\\circ ?[)}]?"
)
DEEPEST = 6  # levels of lists in lists


def same_answer(answer: str | None, reference: str | None) -> bool:
    r"""Whether an answer says what the reference says: values are compared, exactly, not strings.

    - Plain numbers are compared as fractions: 1,200 is 1200, 1\frac12 is 1.5, 0.333 is not 1/3.
    - A unit may be missing on one side. Where both sides name one, it must be the same.
    - Equations are claims: x = 5 and x = 10/2 = 5 answer 5, and 4 = 5 does not.
    - Lists need not be in order; tuples, intervals and named parts must be.
    - A calculation that was not carried out (17 + 1) does not answer a number.
    - An empty reference matches nothing. docs/grading.md has the whole table.

    Raises CannotCompare if math-verify's process was killed twice from outside.
    """
    answer, reference = (answer or "").strip(), (reference or "").strip()
    if max(len(answer), len(reference)) > LONGEST_ANSWER:
        return answer == reference
    if _PLAIN.fullmatch(answer) and _PLAIN.fullmatch(reference):  # most answers of GSM8K
        return Fraction(answer.replace(",", "")) == Fraction(reference.replace(",", ""))
    answer, reference = _unframed(_unboxed(answer)), _unboxed(reference)
    if not answer or not reference:
        return False
    return _same(answer, reference, DEEPEST)


def _unboxed(text: str) -> str:
    """The text in one spelling; the contents of its boxes if it has any, as a list if several."""
    if _BOX.search(text):
        if _TOUCHED.search(re.sub(r"(?<!\\)\$|\\[()\[\]]|\\displaystyle", "", text)):
            text = _BOX.sub("", text)  # -\boxed{7} is -7
            text = re.sub(r"(?<![\w\\}])\{([\d.,]+)\}", r"\1", text)
        else:
            contents = boxed_answers(text)
            text = ", ".join(contents) if all(contents) else ""
    return one_spelling(text)


def _unframed(text: str) -> str:
    """The answer in `The answer is 12.` and `12 is the answer`; of anything else all."""
    for frame in _FRAMES:
        if match := frame.fullmatch(text):
            return one_spelling(match[1])
    return text


def _same(answer: str, reference: str, depth: int) -> bool:
    if _squashed(answer) == _squashed(reference):
        return True
    if not depth:
        return False
    for compare in _RULES:
        same = compare(answer, reference, depth - 1)
        if same is not None:
            return same
    return _same_expression(answer, reference)


# ---- the rules: True, False, or None where a rule does not apply


def _implied(answer: str, reference: str, depth: int) -> bool | None:
    r"""Of `y-2 = 3(x-2) \implies y = 3x-4` the last statement is the answer."""
    if r"\implies" not in answer or r"\implies" in reference:
        return None
    return _same(answer.rpartition(r"\implies")[2].strip(), reference, depth)


def _approximated(answer: str, reference: str, depth: int) -> bool | None:
    r"""`12\pi \approx 37.7` answers 12\pi if 37.7 is near it; `\approx 8.2` is 8.2."""
    exact, sign, decimal = answer.partition(r"\approx")
    if not sign or r"\approx" in reference:
        return None
    if not exact.strip():
        return _same(decimal.strip(), reference, depth)
    exact = _EQUALS.split(exact)[-1].strip()
    rounded = quantity(decimal.strip())
    if rounded.value is None or not _same(exact, reference, depth):
        return False
    value = quantity(exact).value
    near = value if value is not None else for_math_verify(exact, None)
    places = len(rounded.text.partition(".")[2])
    half_a_unit = Fraction(51, 100) / 10**places
    return bool(near) and nearly_equal(str(near), str(rounded.value), str(half_a_unit))


def _plus_or_minus(answer: str, reference: str, depth: int) -> bool | None:
    r"""`2 \pm \sqrt7` is the list of both."""
    if r"\pm" not in answer + reference:
        return None
    return _same(_both_signs(answer), _both_signs(reference), depth)


def _both_signs(text: str) -> str:
    if r"\pm" not in text:
        return text
    name, equals, value = text.rpartition("=")
    value = value if equals and _NAME.fullmatch(name.strip()) else text
    signs = (("+", "-"), ("-", "+"))
    versions = [value.replace(r"\pm", plus).replace(r"\mp", minus) for plus, minus in signs]
    return ", ".join(version.strip().removeprefix("+").strip() for version in versions)


def _relations(answer: str, reference: str, depth: int) -> bool | None:
    r"""`x < 5 \text{ or } x > 7`, `\{x \mid x < 5\}` and `x \in [0, 5]` as the intervals meant."""
    if not re.search(r"\\cup|[<>]|\\[lgn]e(?![a-z])|\\in(?![a-z])|\\infty|\\mathbb", reference):
        if not _COMPARISON.search(answer) and r"\in" not in answer:
            return None  # (1,2) or (3,4) are points
    sets = _as_intervals(answer), _as_intervals(reference)
    if sets == (answer, reference):
        return None
    if not all(sets):
        return False
    if sets[0] != answer and sets[0][0] in "([" and len(_items(reference)) > 1:
        return False  # 2 < x < 5 is no list
    letters = [
        set(re.findall(r"(?<![\\A-Za-z])[a-z](?![A-Za-z])", text)) for text in (answer, reference)
    ]
    if all(_COMPARISON.search(text) for text in (answer, reference)) and letters[0] != letters[1]:
        return False
    return _same(*sets, depth)


def _as_intervals(text: str) -> str:
    """The set of numbers that a relation allows; other text as it is; "" where none can be read."""
    if builder := _SET_BUILDER.fullmatch(text):
        text = builder[2] if re.search(rf"\b{builder[1]}\b", builder[2]) else text
    if without := _WITHOUT.fullmatch(text):
        point = without[1] or without[2] or without[4]
        return rf"(-\infty,{point}) \cup ({point},\infty)"
    text = re.sub(r"^[A-Za-z] ?\\in(?![a-z]) ?", "", text)
    if _REALS.fullmatch(text):
        return r"(-\infty,\infty)"
    if re.search(r"[)\]] ?(?:U|or|and) ?[(\[]", text):
        text = re.sub(r"(?<=[)\]]) ?(?:U|or) ?(?=[(\[])", r" \\cup ", text)
        return text
    if not _COMPARISON.search(text):
        return text
    parts = re.split(r" ?(,|;|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])) ?", text)
    intervals = [_interval(part) for part in parts[::2]]
    if any(interval is None for interval in intervals):
        return text
    joined = {r"\cup" if joint == "or" else r"\cap" for joint in parts[1::2]}
    if len(joined) > 1 or len({variable for variable, _ in intervals}) > 1:
        return text
    if joined == {r"\cap"}:
        return _intersection([interval for _, interval in intervals]) or ""
    return rf" {''.join(joined)} ".join(interval for _, interval in intervals)


def _interval(text: str) -> tuple[str, str] | None:
    """The variable and the interval of one relation with constant bounds."""
    parts = _COMPARISON.split(text.strip())
    bounds, signs = parts[::2], parts[1::2]
    letters = [bool(re.fullmatch(r"[a-zA-Z]", bound)) for bound in bounds]
    if not signs or letters.count(True) != 1 or not all(bounds):
        return None
    place = letters.index(True)
    variable = bounds[place]
    others = "".join(bound for bound in bounds if bound != variable)
    if re.search(rf"(?<![\\A-Za-z]){variable}(?![A-Za-z])", others):
        return None
    if signs == [r"\ne"]:
        bound = bounds[1 - place]
        return variable, rf"(-\infty,{bound}) \cup ({bound},\infty)"
    less = [sign in ("<", r"\le") for sign in signs]
    if r"\ne" in signs or len(set(less)) > 1 or len(signs) > 2 or len(signs) == 2 and place != 1:
        return None
    if not less[0]:
        bounds, signs = bounds[::-1], signs[::-1]
        place = len(bounds) - 1 - place
    low, high = r"(-\infty", r"\infty)"
    if place > 0:
        low = ("[" if signs[place - 1] in (r"\le", r"\ge") else "(") + bounds[place - 1]
    if place < len(signs):
        high = bounds[place + 1] + ("]" if signs[place] in (r"\le", r"\ge") else ")")
    return variable, f"{low},{high}"


def _intersection(intervals: list[str]) -> str | None:
    """The intersection of two intervals of which one bounds from below, the other from above."""
    lows = [i.split(",")[0] for i in intervals if not i.startswith(r"(-\infty")]
    highs = [i.split(",")[1] for i in intervals if not i.endswith(r"\infty)")]
    if any(r"\cup" in interval for interval in intervals) or len(lows) != 1 or len(highs) != 1:
        return None
    bounds = number(lows[0][1:].strip()), number(highs[0][:-1].strip())
    if None not in bounds and bounds[0] >= bounds[1]:
        return None
    return f"{lows[0]},{highs[0]}"


def _named_parts(answer: str, reference: str, depth: int) -> bool | None:
    """`x = 3, y = -2` for (3,-2), and `x = 2 or x = 5` for 2, 5."""
    named, expected = _assignments(answer), _assignments(reference)
    if named is None and expected is None:
        return None
    for parts, text in ((named, answer), (expected, reference)):
        if parts and len(_bases_of_names(parts)) > 1 and re.search(r"(?<![A-Za-z])or ", text):
            return False  # x = 1 or y = 4 is no point
    if named and expected:
        if len(_bases_of_names(named + expected)) == 1:  # several solutions
            return _same_values(named, expected, depth)
        values = dict(expected)
        if len(named) != len(expected) or values.keys() != dict(named).keys():
            return False
        return all(_same(value, values[name], depth) for name, value in named)
    parts, other = (named, reference) if named else (expected, answer)
    if _EQUALS.search(other):
        return None
    kind, values = _parts(other)
    if len(values) != len(parts):
        return False
    if len(_bases_of_names(parts)) == 1:  # several solutions
        if kind == "()":
            return False
        return _same_values(parts, [("", value) for value in values], depth)
    mine = [value for _, value in sorted(parts)] if _are_coordinates(parts) else None
    mine = mine or [value for _, value in parts]
    pairs = zip(mine, values, strict=True)
    return all(_same(*(pair if named else pair[::-1]), depth) for pair in pairs)


def _assignments(text: str) -> list[tuple[str, str]] | None:
    """The parts of `a = 1, b = 2` by name; None if a part has no name or there is only one."""
    sides = _sides(text)
    if len(sides) == 2 and _TUPLE_OF_NAMES.fullmatch(sides[0]):
        names, (kind, values) = _items(sides[0][1:-1]), _parts(sides[1])
        if kind == "()" and len(names) == len(values) == len(set(names)):
            return list(zip(names, values, strict=True))
    items = _items(text)
    if len(items) < 2:
        return None
    parts = []
    for item in items:
        sides = [side.strip() for side in _EQUALS.split(item)]
        if len(sides) != 2 or not re.fullmatch(r"\\?[A-Za-z]+ ?(?:_ ?\{?\w+\}?)?", sides[0]):
            return None
        parts.append((sides[0].replace(" ", "").replace("{", "").replace("}", ""), sides[1]))
    return parts


def _bases_of_names(parts: list[tuple[str, str]]) -> set[str]:
    """The names without their indices: only x of x_1 and x_2."""
    return {name.split("_")[0] for name, _ in parts}


def _are_coordinates(parts: list[tuple[str, str]]) -> bool:
    return {name for name, _ in parts} in ({"x", "y"}, {"x", "y", "z"})


def _same_values(one: list[tuple[str, str]], other: list[tuple[str, str]], depth: int) -> bool:
    return _same_lists([value for _, value in one], [value for _, value in other], depth)


def _equations(answer: str, reference: str, depth: int) -> bool | None:
    """Claims: `x = 18` answers 18, which 17 = 18 and 2x = 18 do not."""
    sides, expected = _sides(answer), _sides(reference)
    if len(sides) == 1 and len(expected) == 1:
        return None
    if "==" in answer:  # no equation, and each sign of a long row would be a side of its own
        return False
    if len(expected) == 1:
        if _CHOICE.fullmatch(reference) and all(map(_CHOICE.fullmatch, sides)):
            return False  # A = B
        if _TUPLE_OF_NAMES.fullmatch(sides[0]) and len(sides) == 2:
            names, (kind, values) = _items(sides[0][1:-1]), _parts(sides[1])
            if kind == "()" and len(values) != len(set(names)):
                return False
            return _same(sides[1], reference, depth)
        claims = [side for side in sides if not _is_name(side)]
        if not claims:
            return None
        results = [side for side in claims if not _is_uncomputed(side)]
        steps = [for_math_verify(side, None) for side in claims if _is_uncomputed(side)]
        if not results or not all(_same(side, reference, depth) for side in results):
            return False
        result = for_math_verify(results[0], number(results[0]))
        return all(step and equal_expressions(step, result) for step in steps)
    if len(sides) == 1:
        named = len(expected) == 2 and _is_name(expected[0])
        return _same(answer, expected[1], depth) if named else False
    if len(_items(answer)) != len(_items(reference)):
        return False
    if len(_items(answer)) > 1:
        return _same_lists(_items(answer), _items(reference), depth)
    if len(sides) == len(expected) == 2 and _squashed(sides[0]) == _squashed(expected[0]):
        if _is_name(sides[0]) and len(_squashed(sides[0])) == 1:
            return _same(sides[1], expected[1], depth)
    if len(sides) != 2 or len(expected) != 2 or _has_words(answer, reference):
        return False
    return None


def _sides(text: str) -> list[str]:
    return [side.strip() for side in _EQUALS.split(text)]


def _is_name(side: str) -> bool:
    """Whether a side of an equation only names what the other side gives."""
    words = {word.lower() for word in re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", side)}
    return bool(_NAME.fullmatch(side)) and not words & VALUE_WORDS


def _times_and_ratios(answer: str, reference: str, depth: int) -> bool | None:
    """3:45 PM is a time of day, 4:3 and 4:3:2 are ratios; a ratio of two is a fraction."""
    times = _TIME.fullmatch(answer), _TIME.fullmatch(reference)
    if all(times):
        one, other = (
            (int(time[1]), time[2], time[3], re.sub(r"[. ]", "", time[4] or "").lower())
            for time in times
        )
        halves_agree = not one[3] or not other[3] or one[3] == other[3]
        return one[:3] == other[:3] and halves_agree
    if ":" in reference and (words := _RATIO_IN_WORDS.fullmatch(answer)):
        answer = f"{words[1]}:{words[2]}{words[3].replace(' to ', ':')}"
    ratios = [[number(part.strip()) for part in text.split(":")] for text in (answer, reference)]
    if len(ratios[1]) > 2 and len(ratios[0]) < 2 and None not in ratios[1]:
        return False
    if max(map(len, ratios)) < 2 or any(part is None for ratio in ratios for part in ratio):
        return None
    if times[1]:  # 12:00 is a time, 12 is none
        return None if min(map(len, ratios)) < 2 else ratios[0] == ratios[1]
    if len(ratios[0]) != len(ratios[1]):
        if max(map(len, ratios)) > 2:
            return False
        ratios = [[*ratio, Fraction(1)][:2] for ratio in ratios]
    (a, *rest), (b, *others) = ratios
    if not a or not b:
        return ratios[0] == ratios[1]
    return [part / a for part in rest] == [part / b for part in others]


def _quantities(answer: str, reference: str, depth: int) -> bool | None:
    """Numbers, and numbers with units."""
    mine, expected = quantity(answer), quantity(reference)
    if expected.value is None and not (mine.unit or expected.unit):
        return None
    if mine.says_more and mine.value is None and expected.value is not None:
        return False
    if (
        mine.value is None
        and len(_items(answer)) > 1
        or expected.value is None
        and (len(_items(reference)) > 1)
    ):
        return None
    if not same_unit(mine.unit, expected.unit):
        return False
    if mine.value is not None and expected.value is not None:
        return mine.value == expected.value
    if expected.value is not None:
        return _same_as_number(mine, expected)
    if _squashed(mine.text) == _squashed(expected.text):
        return True
    return _same(mine.text, expected.text, depth) if mine.unit or expected.unit else None


def _same_as_number(mine: Quantity, expected: Quantity) -> bool | None:
    text = mine.text
    if text.startswith("[") or _is_uncomputed(text) or not _CALCULATION.fullmatch(text):
        return False
    expression = for_math_verify(text, mine.value)
    return bool(expression) and equal_expressions(expression, str(expected.value))


def _is_uncomputed(text: str) -> bool:
    text = re.sub(r"(?<=[\d)]) ?\((?=-?[\d(])|\) ?(?=\d)", "*", text)
    return bool(_UNCOMPUTED.fullmatch(re.sub(r"[ (){}]|\\(?=[{}])", "", text)))


def _bases(answer: str, reference: str, depth: int) -> bool | None:
    """1101_2 and (1101)_2, and 1101 where the reference names the base; not 1101 for 1101_2's
    value.
    """
    answer, reference = _with_base_as_index(answer), _with_base_as_index(reference)
    mine, expected = _IN_BASE.fullmatch(answer), _IN_BASE.fullmatch(reference)
    if not mine and not expected:
        return None
    if not expected:
        return False
    one = _plain_base(answer)
    other = _plain_base(reference)
    return one == other or one == other.partition("_")[0]


def _with_base_as_index(text: str) -> str:
    """1101_2 for `1101 base 2`, `1101 (base two)` and 1101_two."""
    match = _BASE_IN_WORDS.fullmatch(text)
    if not match:
        return text
    base = match[2] if match[2].isdecimal() else small_number(match[2].lower())
    return f"{match[1]}_{base}" if base else text


def _plain_base(text: str) -> str:
    return re.sub(r"[ (){}]", "", text).upper()


def _words(answer: str, reference: str, depth: int) -> bool | None:
    choices = _CHOICE.fullmatch(answer), _CHOICE.fullmatch(reference)
    if all(choices):
        return choices[0][1] == choices[1][1]
    if _WORDS.fullmatch(answer) and _WORDS.fullmatch(reference):
        return False  # _squashed has compared them
    return None


def _collections(answer: str, reference: str, depth: int) -> bool | None:
    """Lists, sets, tuples and intervals, part by part."""
    answer = re.sub(r"^[A-Z] ?(?=\([^()]*,)", "", answer)  # P(3,-2)
    (kind, mine), (expected_kind, expected) = _parts(answer), _parts(reference)
    if len(mine) < 2 and len(expected) < 2:
        if "[" in (kind + expected_kind) or r"\emptyset" in (answer, reference):
            return False
        return None
    unions = r"\cup" in answer + reference or r"\cap" in answer + reference
    if unions:
        if any(_is_reversed(text) for text in (answer, reference)):
            return False
        return None
    if len(mine) != len(expected):
        return False
    if "..." in mine or kind in ("()", "[]", "[)", "(]") or expected_kind not in ("", "{}"):
        if kind != expected_kind and not {kind, expected_kind} <= {"()", ""}:
            return False
        return all(_same(*pair, depth) for pair in zip(mine, expected, strict=True))
    return _same_lists(mine, expected, depth)


def _is_reversed(text: str) -> bool:
    """Whether an interval of a union ends before it begins."""
    for low, high in re.findall(r"[(\[]([^()\[\],]*),([^()\[\],]*)[)\]]", text):
        bounds = number(low.strip()), number(high.strip())
        if None not in bounds:
            if bounds[0] > bounds[1]:
                return True
        elif "infty" not in low + high:
            low, high = for_math_verify(low, bounds[0]), for_math_verify(high, bounds[1])
            if equal_expressions(rf"\left|({low})-({high})\right|", f"({low})-({high})"):
                return True
    return False


def _parts(text: str) -> tuple[str, list[str]]:
    """The brackets around a collection, "" for a plain list, and its parts."""
    text = re.sub(r"^\\\{(.*)\\\}$", r"{\1}", text).strip()
    if text[:1] in _PAIRS and text[-1:] in ")]}" and _closes_at_the_end(text):
        inside = _items(text[1:-1].strip())
        if len(inside) > 1 or text[0] in "[":
            return text[0] + text[-1], inside
    if len(text) > 2 and text[0] == "{" and text[-1] == "}" and _closes_at_the_end(text):
        return "{}", _items(text[1:-1].strip())
    return "", _items(text)


def _closes_at_the_end(text: str) -> bool:
    """Whether the first bracket is closed by the last one; intervals mix ( and [."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return place == len(text) - 1
    return False


def _items(text: str) -> list[str]:
    """The items of a list; a number with commas is one item."""
    if number(text) is not None:
        return [text]
    levels = list(accumulate((c in "([{") - (c in ")]}") for c in text))
    items, start = [], 0
    for match in _SEPARATORS.finditer(text):
        place = match.start()
        if (levels[place - 1] if place else 0) == 0 and match.end() > start:
            items.append(text[start:place].strip())
            start = match.end()
    items.append(text[start:].strip())
    items = [re.sub(r"^(?:and|or) ", "", item) for item in items]
    return [item for item in items if item] or [text]


def _same_lists(mine: list[str], expected: list[str], depth: int) -> bool:
    """Whether the items are the same in any order."""
    if len(mine) != len(expected):
        return False
    left = list(expected)
    for item in mine:
        match = next((other for other in left if _same(item, other, depth)), None)
        if match is None:
            return False
        left.remove(match)
    return True


_RULES = (
    _implied,
    _approximated,
    _plus_or_minus,
    _relations,
    _named_parts,
    _equations,
    _times_and_ratios,
    _bases,
    _quantities,
    _words,
    _collections,
)


# ---- expressions, for math-verify


def _same_expression(answer: str, reference: str) -> bool:
    value, reference_value = number(answer), number(reference)
    if reference_value is not None and not _CALCULATION.fullmatch(answer):
        return False
    if (
        _has_words(answer, reference)
        or _INDEXED_NUMBER.search(answer)
        and not _INDEXED_NUMBER.search(reference)
    ):
        return False
    expressions = for_math_verify(answer, value), for_math_verify(reference, reference_value)
    return all(expressions) and equal_expressions(*expressions)


def _has_words(answer: str, reference: str) -> bool:
    """Whether the answer has words that the reference has not: math-verify would skip them."""
    answer, reference = (
        re.sub(r"\\(?:begin|end) ?\{\w+\}", "", text) for text in (answer, reference)
    )
    words = re.compile(rf"(?<![\\A-Za-z])(?!(?:{_FUNCTIONS})(?![A-Za-z]))[A-Za-z]{{3,}}")
    return bool(
        {word.lower() for word in words.findall(answer)}
        - {word.lower() for word in words.findall(reference)}
    )


def _squashed(text: str) -> str:
    """The text without spaces and braces that mean nothing; without case where it is words."""
    text = re.sub(r"([_^]) ?\{ ?(\w+) ?\}", r"\1\2", text)
    text = re.sub(
        r"(?<![A-Za-z\d]) | (?![A-Za-z\d])|(?<=\d) (?=[A-Za-z])|(?<=[A-Za-z]) (?=\d)", "", text
    )
    return text.strip("().").casefold() if _WORDS.fullmatch(text) else text


def for_math_verify(text: str, value: Fraction | None) -> str:
    r"""The text as math-verify gets it: decimals as fractions, which it would round.

    "" for monsters and for text that would leave \boxed{}.
    """
    if value is not None:
        return str(value)
    tokens = re.findall(r"\\.|[{}]", text)
    levels = [0, *accumulate((token == "{") - (token == "}") for token in tokens)]
    if levels[-1] or min(levels) < 0 or max(levels) > 20 or _MONSTER.search(text):
        return ""
    text = re.sub(r"(?<=\d) ?(?:\*|\\cdot) ?i(?![A-Za-z])", "i", text)  # math-verify knows 3i
    text = _TRIGONOMETRIC.sub(r"\1(\\frac{\2\\pi}{180})", text)
    text = re.sub(r"(?<![\d.])(\d+) ?/ ?(\d+) ?(?=\\?[A-Za-z])", r"\\frac{\1}{\2}", text)
    return re.sub(r"(?<![\d.])\d*\.\d+(?![\d.])", lambda decimal: f"({Fraction(decimal[0])})", text)
