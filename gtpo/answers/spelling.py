r"""One spelling for what TeX, Unicode and English spell in many ways.

`one_spelling` changes how an answer is written, never its value: `½` becomes `1/2`, `x⁴` becomes
`x^{4}`, `\mathbf{12}` becomes `12`. Everything else in this wing reads the one spelling only.
"""

import re
import unicodedata

CURRENCIES = {"$": "dollars", "€": "euros", "£": "pounds", "¥": "yen", "₹": "rupees", "¢": "cents"}
CURRENCIES |= {"₩": "won", "₱": "pesos", "₽": "rubles", "₪": "shekels", "₺": "liras", "₦": "naira"}

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
    "∶": ":",
    "∨": r"\lor ",
    "∧": r"\land ",
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


_OVERLINED = re.compile("(?:[0-9][\u0304\u0305])+")


def plain_characters(text: str) -> str:
    """`text` with TeX in place of mathematical Unicode, and without characters nobody can see."""
    text = _OVERLINED.sub(lambda found: rf"\overline{{{found[0][::2]}}}", text)
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
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|sl|up|md|normal)?|[mh]box|operatorname\*?|ensuremath|framebox|"
    r"math(?:rm|bf|it|sf|tt|normal|bin|ord|op)|boldsymbol|bm|pmb|emph|underline|uline)"
    r" ?\{([^{}]*)\}"
)
_TEX = [
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        (r"\\(?:text)?color(?:box)? ?\{[^{}]*\}", ""),
        (r"\\(?:tag\*?|label|[hv]space\*?|phantom) ?\{[^{}]*\}", " "),
        (
            r"\\(?:tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|bf|it|"
            r"rm|sf|tt|sc|bfseries|itshape|boldmath|hfill|(?:math)?strut|noindent|centering)"
            r"(?![A-Za-z])",
            " ",
        ),
        (r"\\(?:blacksquare|square|Box|qed)\W*$", ""),
        (r"</?(?:b|i|u|em|strong|p|span|div|center) ?>|<br ?/?>", " "),
        (r"(?<![\w)}\]])~+(?= ?\\?\$? ?[\d.])", r"\\sim "),  # ~5 is about 5
        (
            r"\\(?:begin|end) ?"
            r"\{(?:equation|align(?:ed)?|gather(?:ed)?|split|displaymath|center)\*?\}",
            " ",
        ),
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?|(?:display|text)style|limits)(?![A-Za-z])", ""),
        (r"\\(?:therefore|because)(?![A-Za-z])", " "),
        (r"\\(?:Rightarrow|Longrightarrow|rightarrow|longrightarrow|to)(?![A-Za-z])", r"\\implies"),
        (r"\\(?:leq|leqslant)(?![A-Za-z])", r"\\le"),
        (r"\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge"),
        (r"\\neq(?![A-Za-z])", r"\\ne"),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:lor|vee)(?![A-Za-z])", " or "),
        (r"\\(?:land|wedge|&)(?![A-Za-z])", " and "),
        (r"\\colon(?![A-Za-z])", ":"),
        (r"\\([lr])brace(?![A-Za-z])", lambda side: r"\{" if side[1] == "l" else r"\}"),
        (r"\\surd(?![A-Za-z])", r"\\sqrt"),
        (r"\\textsuperscript ?\{", "^{"),
        (r"\\(?:[lc]?dots|dotsc|dotsb)(?![A-Za-z])", "..."),
        (r"\\varnothing(?![A-Za-z])|\\\{ *\\\}", r"\\emptyset "),
        (r"\s*(?<!\\)\\!\s*", ""),
        (r"\\q?quad(?![A-Za-z])", " ; "),
        (r"(?<!\\)(?:\\[,;:()\[\]\s]|~)", " "),
        (r"\\(?:[dtcsx]|nice)frac(?![A-Za-z])", r"\\frac"),
        (r"(?:^|(?<= ))\^ ?\{?(\d+)\}? ?/ ?_ ?\{?(\d+)\}?", r"\\frac{\1}{\2}"),
        (r"\{([^{}]*)\} ?\\over(?![A-Za-z]) ?\{([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"^([^{}\\]+)\\over(?![A-Za-z])([^{}\\]+)$", r"\\frac{\1}{\2}"),
        (r"\{ ?([^{}]*?) ?\\over(?![A-Za-z]) ?([^{}]*?) ?\}", r"\\frac{\1}{\2}"),
        (r"\{ ?([,:]) ?\}", r"\1"),
        (r"\\?sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|log|ln|exp|infty)(?![A-Za-z])", r"\\\1"),
        (r"(?<![\\A-Za-z])(?:inf(?:inity)?|oo)(?![A-Za-z])", r"\\infty "),
        (r"\\frac ?(\d|\\pi) ?(?=[\d{\\])", r"\\frac{\1}"),
        (r"\\frac ?(\{[^{}]*\}) ?(\d)", r"\\frac\1{\2}"),
        (r" ?_ ?", "_"),
        (r"\\log_(\w) ", r"\\log_{\1} "),
        (r"\^ ?\{? ?\\(?:circ|degree) ?\}?|\\degree(?![A-Za-z])", r"^\\circ "),
        (r"(?<=[\w)}])\*\*(-?\d+(?:\.\d+)?)", r"^{\1}"),
        (r"(?<=[\w)}])\*\*(?=[\w({-])", "^"),
        (r"\*\*", ""),  # bold in Markdown
        (r"\^ ?(-\d+)", r"^{\1}"),
        (r"^(?:minus|negative) (?=\\?[$\d.])", "-"),
        (r"([<>]) ?=", lambda sign: r"\le " if sign[1] == "<" else r"\ge "),
        (r" +", " "),
    )
]
# Three dots at the end say that more follows: 0.333... is 1/3 and 1, 2, ... is no pair.
_ENDS = re.compile(r"^[ *`,;]*(?:= ?)?|(?:[ *`,;:]|(?<!\.)\.(?!\.))+$")
_QUOTED = re.compile(r"(['\"`_]+)(.*)\1")
_CASES = re.compile(r"\\begin ?\{cases\}([^&]*?)\\end ?\{cases\}", re.DOTALL)
_ANY_ALIGNMENT = re.compile(r"(?<!\\)&")
_ALIGNMENT = re.compile(r"(?<!\\)&(?= ?[=<>\\])|(?<=[=<>]) ?&")
_LINES = re.compile(r"(?<=[\w)}\]]) *(?:\n|\\\\) *(?=[\w\\({\[-])")


def one_spelling(text: str) -> str:
    r"""`text` in the one spelling; dollars stay as `\$`, signs of formulas ($, \(, \[) go."""
    text = _CASES.sub(r" \1 ", plain_characters(text))
    if not re.search(r"\\begin ?\{[pbvBV]?(?:small)?matrix|\\begin ?\{(?:array|cases)", text):
        text = (_ANY_ALIGNMENT if r"\begin" in text else _ALIGNMENT).sub(" ", text)
        text = re.sub(r"(?<!\\)&", " and ", text)
        text = _LINES.sub(" ; ", text)  # a line is a statement of its own
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
    text = re.sub(r"(?<![\w)}])\^\{([34])\}√", lambda found: "∛∜"[int(found[1]) - 3], text)
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
