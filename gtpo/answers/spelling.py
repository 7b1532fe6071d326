r"""One spelling for what TeX, Unicode and English spell in many ways.

`one_spelling` changes how an answer is written, never its value: `½` becomes `1/2`, `x⁴` becomes
`x^{4}`, `\mathbf{12}` becomes `12`. Everything else in this wing reads the one spelling only.
"""

import re
import unicodedata

CURRENCIES = {"$": "dollars", "€": "euros", "£": "pounds", "¥": "yen", "₹": "rupees", "¢": "cents"}

_SYMBOLS = {
    **dict.fromkeys("×✕⨯", r"\times "),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("⇒⟹→⟶", r"\implies "),
    **dict.fromkeys("°º", r"^\circ "),
    **dict.fromkeys("∅⌀", r"\emptyset "),
    **dict.fromkeys("“”„‟«»", '"'),
    **dict.fromkeys("‘’‚‛′", "'"),
    "±": r"\pm ",
    "∓": r"\mp ",
    "≈": r"\approx ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∠": r"\angle ",
    "∴": "",
    "…": "...",
    "−": "-",
    "∣": "|",
    "√": "√",  # a root sign, read below
    "∛": "∛",
    "∜": "∜",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℚ": r"\mathbb{Q}",
    "ℕ": r"\mathbb{N}",
    "ℂ": r"\mathbb{C}",
}
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_NEAREST_UNDER_ROOT = r"\d+(?:\.\d+)?|\.\d+|[A-Za-z]|\\[A-Za-z]+"


def plain_characters(text: str) -> str:
    """`text` with TeX in place of mathematical Unicode, and without characters nobody can see."""
    written, level = [], ""  # level: "^" or "_" while superscripts or subscripts follow each other
    for character in text:
        kind, _, plain = unicodedata.decomposition(character).partition(" ")
        raised = {"<super>": "^", "<sub>": "_"}.get(kind, "") if character != "º" else ""
        if level and raised != level:
            written.append("}")
        if raised and raised != level:
            written.append(raised + "{")
        level = raised
        written.append(_plain_character(character, kind))
    return "".join(written) + ("}" if level else "")


def _plain_character(character: str, kind: str) -> str:
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    if character.isascii():
        return character
    category = unicodedata.category(character)
    if category == "Cf":  # joiners, marks of the direction of writing, byte order marks
        return ""
    if category == "Zs":
        return " "
    if category == "Pd":
        return "-"
    if kind == "<fraction>":
        return " " + unicodedata.normalize("NFKC", character).replace("⁄", "/")
    name = unicodedata.name(character, "")
    if greek := re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)", name):
        letter = greek[2].lower().replace("lamda", "lambda")
        return f"\\{letter.title() if greek[1] == 'CAPITAL' else letter} "
    plain = unicodedata.normalize("NFKC", character)
    return plain.replace("−", "-") if kind else character


_WRAPPERS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|[mh]box|math(?:rm|bf|it|sf|tt|normal)|operatorname\*?|"
    r"boldsymbol|bm|emph|underline|uline) ?\{([^{}]*)\}"
)
_TEX = [
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        (r"\\(?:text)?color ?\{[^{}]*\}", ""),
        (r"\\(?:begin|end) ?\{(?:equation|align(?:ed)?|gather(?:ed)?|split|displaymath)\*?\}", " "),
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?|(?:display|text)style|limits)(?![A-Za-z])", ""),
        (r"\\(?:therefore|because)(?![A-Za-z])", " "),
        (r"\\(?:Rightarrow|Longrightarrow|rightarrow|longrightarrow|to)(?![A-Za-z])", r"\\implies"),
        (r"\\(?:leq|leqslant)(?![A-Za-z])", r"\\le"),
        (r"\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge"),
        (r"\\neq(?![A-Za-z])", r"\\ne"),
        (r"\\(?:[lc]?dots|dotsc|dotsb)(?![A-Za-z])", "..."),
        (r"\\varnothing(?![A-Za-z])|\\\{ *\\\}", r"\\emptyset "),
        (r"\s*(?<!\\)\\!\s*", ""),
        (r"\\q?quad(?![A-Za-z])", " ; "),
        (r"(?<!\\)(?:\\[,;:()\[\]\s]|~)", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\{ ?([^{}]*?) ?\\over(?![A-Za-z]) ?([^{}]*?) ?\}", r"\\frac{\1}{\2}"),
        (r"\{ ?([,:]) ?\}", r"\1"),
        (r"\\?sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|log|ln|infty)(?![A-Za-z])", r"\\\1"),
        (r"(?<![\\A-Za-z])inf(?:inity)?(?![A-Za-z])", r"\\infty "),
        (r"\\frac ?(\d|\\pi) ?(?=[\d{\\])", r"\\frac{\1}"),
        (r"\\frac ?(\{[^{}]*\}) ?(\d)", r"\\frac\1{\2}"),
        (r" ?_ ?", "_"),
        (r"\\log_(\w) ", r"\\log_{\1} "),
        (r"\^ ?\{? ?\\(?:circ|degree) ?\}?|\\degree(?![A-Za-z])", r"^\\circ "),
        (r"(?<=[\w)}])\*\*(?=[\w({-])", "^"),
        (r"([<>]) ?=", lambda sign: r"\le " if sign[1] == "<" else r"\ge "),
        (r" +", " "),
    )
]
_ENDS = re.compile(r"^[ *`]*(?:= ?)?|[ *`.,;:]+$")
_QUOTED = re.compile(r"(['\"`]+)(.*)\1")
_LINES = re.compile(r"(?<=[\w)}\]]) *(?:\n|\\\\) *(?=[\w\\({\[-])")


def one_spelling(text: str) -> str:
    r"""`text` in the one spelling; dollars stay as `\$`, signs of formulas ($, \(, \[) go."""
    text = plain_characters(text)
    if not re.search(r"\\begin ?\{[pbvBV]?(?:small)?matrix|\\begin ?\{(?:array|cases)", text):
        text = _LINES.sub(" ; ", text.replace("&", " "))  # a line is a statement of its own
    text = _without_formula_signs(" ".join(text.split()))
    for _ in range(4):  # wrappers within wrappers
        text, wrappers = _WRAPPERS.subn(r" \1 ", text)
        if not wrappers:
            break
    for pattern, spelling in _TEX:
        text = pattern.sub(spelling, text)
    text = _ENDS.sub("", _roots(text)).strip()
    if quoted := _QUOTED.fullmatch(text):
        text = _ENDS.sub("", quoted[2]).strip()
    return _outer_braces(text)


def _without_formula_signs(text: str) -> str:
    """A lone dollar sign is money ($18); two of them enclose a formula ($x + 1$)."""
    signs = re.findall(r"(?<!\\)\$", text)
    money = len(signs) == 1 or re.fullmatch(r"\$[^$]*\$[^$]*", text) and not text.endswith("$")
    if money and len(re.findall(r"(?<!\\)\$\s?[\d.]", text)) == len(signs):
        return re.sub(r"(?<!\\)\$", r"\\$", text)
    return re.sub(r"(?<!\\)\$+", " ", text)


def _roots(text: str) -> str:
    """Root signs as TeX: √16 is the root of 16, √13/2 half the root of 13."""
    while match := re.search(r"[√∛∜] ?", text):
        root, rest = _ROOTS[match[0][0]], text[match.end() :]
        if rest[:1] in ("(", "{"):
            end = _closing(rest)
            under, rest = rest[1:end], rest[end + 1 :]
        else:
            nearest = re.match(_NEAREST_UNDER_ROOT, rest)
            under = nearest[0] if nearest else ""
            rest = rest[len(under) :]
        text = f"{text[: match.start()]}{root}{{{under}}}{rest}"
    return text


def _closing(text: str) -> int:
    """The place of the bracket that closes the one at the start; the last place if none does."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "({") - (character in ")}")
        if depth == 0:
            return place
    return len(text) - 1


def _outer_braces(text: str) -> str:
    while len(text) > 1 and text[0] == "{" and _closing(text) == len(text) - 1 and text[-1] == "}":
        text = text[1:-1].strip()
    return text
