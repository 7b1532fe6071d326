"""One spelling for what TeX, Unicode and English spell in many ways."""

import re

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
