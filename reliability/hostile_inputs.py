"""Hostile input, made from a random generator: texts, recipes, answers that are wrong or right,
completions, run directories.

Used by fuzz.py and tests/test_fuzz.py. The same generator state gives the same input.
"""

import json
import random
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
PIECES = [
    *TAGS,
    "<ANSWER>",
    "< answer>",
    "<answer >",
    "&lt;answer&gt;",
    "<reasoning><answer>",
    "</answer></answer>",
    "<script>window.hacked=1</script>",
    "</script>",
    "<!--",
    "-->",
    "]]>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="x',
    "'><svg/onload=x>",
    "javascript:alert(1)",
    "{{ 7*7 }}",
    "{% for x in y %}",
    "${x}",
    "%s%n",
    "\\",
    "\\\\",
    "\\u0000",
    "\\boxed{",
    "\\boxed{5}",
    "\\fbox 7",
    "\\frac{1}{2}",
    "\\frac1",
    "\\sqrt",
    "\\text{",
    "\\left(",
    "\\begin{pmatrix}1&2\\end{pmatrix}",
    "{",
    "}",
    "}}}}",
    "{{{{",
    "(",
    ")",
    "[",
    "]",
    "$",
    "$$",
    "####",
    "###",
    "# ",
    "^",
    "_",
    "^{^{",
    "9^9^9",
    "9" * 50,
    "1e999",
    "0/0",
    "1/0",
    "-",
    "--",
    "+",
    "=",
    "≤",
    "%",
    "!",
    "!!",
    ",",
    ".",
    "..",
    "1,2,3",
    "1,200",
    "3.14",
    "½",
    "∞",
    "-0",
    "nan",
    "inf",
    "None",
    "null",
    "true",
    "x",
    "\\pi",
    "π",
    "²",
    "１８",
    "٣",
    "१",
    "Ⅷ",
    "\u200b",
    "\u202e",
    "\u2066",
    "\ufeff",
    "\u2028",
    "\u0085",
    "\x00",
    "\x1b[2J",
    "\x1b]0;t\x07",
    "\r",
    "\n",
    "\t",
    "\x7f",
    "\x9b",
    "e\u0301" * 3,
    "𝄞",
    "👩‍👩‍👧",
    "\ufffd",
    "\U0010ffff",
    " ",
    "  ",
    "a",
    "or",
    "and",
    "not",
    "answer",
    "5",
    "18",
]
LONG = [
    "(",
    "{",
    "\\frac{",
    "<answer>",
    "9",
    " ",
    "\n",
    "\\boxed{",
    "^2",
    "a",
    "-",
    "1,",
    "$",
    "\\",
    "[",
    "x+",
    "!",
    "\\sqrt",
    "#",
    "<",
    "e\u0301",
    "1 ",
    "=",
    "%",
]


def text(dice: random.Random, pieces: int = 12) -> str:
    """A few pieces and random characters; one in forty has a piece repeated up to 20,000 times."""
    parts = [
        dice.choice(PIECES) if dice.random() < 0.8 else chr(_code(dice))
        for _ in range(dice.randrange(pieces))
    ]
    if dice.random() < 1 / 40:
        parts.insert(
            dice.randrange(len(parts) + 1), dice.choice(LONG) * int(10 ** dice.uniform(1, 4.3))
        )
    return "".join(parts)


def _code(dice: random.Random) -> int:
    """Any code point but half of a surrogate pair, which no decoded completion holds."""
    code = dice.choice(
        [
            dice.randrange(128),
            dice.randrange(0x800),
            dice.randrange(0x10000),
            dice.randrange(0x110000),
        ]
    )
    return code if not 0xD800 <= code < 0xE000 else 0xFFFD


def mutated(dice: random.Random, seed: str, times: int = 4) -> str:
    """`seed` with a few pieces cut out, doubled, replaced or put in."""
    for _ in range(dice.randrange(1, times + 1)):
        a, b = sorted(dice.randrange(len(seed) + 1) for _ in range(2))
        b = min(b, a + 30)
        seed = (
            seed[:a]
            + dice.choice(["", seed[a:b] * 2, text(dice, 3), text(dice, 3) + seed[a:b]])
            + seed[b:]
        )
    return seed


# ---- recipes

RECIPE = """\
run_name: demo
env: {OMP_NUM_THREADS: "1"}
model:
  model_name: demo/model
  max_seq_length: 96
  target_modules: [q_proj, v_proj]
dataset:
  name: gsm8k
  path: demo/data/train.jsonl
training:
  max_prompt_length: 60
  learning_rate: 3e-3
  num_generations: 8
  report_to: none
trainer:
  reward_funcs: [reward_math.final_reward]
gtpo_runtime: {w_raw: 2.0, torch_compile_options: {trace.enabled: false}}
evaluation: {limit: 20}
"""
VALUES = [
    "1e999",
    "-1",
    "0",
    "1" * 400,
    "9" * 5000,
    ".nan",
    "-.inf",
    "0x",
    "0b1",
    "1_000",
    "2001-01-01",
    "2001-99-99",
    "12:30:45",
    "null",
    "~",
    "yes",
    "[]",
    "{}",
    "[[]]",
    "[1, [2, [3]]]",
    "{a: {b: c}}",
    "{1: 2}",
    "{null: 1}",
    "{[a]: 1}",
    "? a",
    "!!int x",
    "!!float x",
    "!!bool x",
    "!!binary x",
    "!!binary '%%'",
    "!!set {a}",
    "!!omap [a: 1]",
    "!!pairs [a: 1]",
    "!!str 5",
    "!!null x",
    "!!timestamp x",
    "!!python/object/apply:os.system [x]",
    "!x y",
    "&a [*a]",
    "*a",
    "<<: *a",
    "'a",
    '"a',
    "|\n a",
    ">-\n a",
    '"\\ud800"',
    '"\\0"',
    '"\\e[31m"',
    "@",
    "`",
    "%",
    "a.b",
    "a:b",
    "os.system",
    "os.path",
    "__main__.x",
    "reward_math.nothing",
    "gtpo.shaping",
    "..a",
    "a..b",
    "é.x",
    "/dev/null",
    "../../x",
    "hf_abcdefghijklmnopqrst",
    "8/12",
    "8/0",
    "none",
    "group",
    "auto",
    "wandb",
    "[wandb, none]",
    "constant",
    "train[:0]",
    "train[",
    "test",
    "-0.0",
    "1e-400",
    "true",
]
KEYS = [
    "run_name",
    "output_root",
    "env",
    "model",
    "model_name",
    "adapter",
    "max_seq_length",
    "max_prompt_length",
    "lora_rank",
    "lora_alpha",
    "target_modules",
    "chat_template",
    "dataset",
    "name",
    "path",
    "subset",
    "subsets",
    "split",
    "system_instruction",
    "training",
    "learning_rate",
    "warmup_ratio",
    "num_generations",
    "optimizer",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "generation_batch_size",
    "steps_per_generation",
    "max_steps",
    "num_train_epochs",
    "report_to",
    "beta",
    "generation_kwargs",
    "reward_weights",
    "temperature",
    "seed",
    "lr_scheduler_type",
    "output_dir",
    "hub_token",
    "trainer",
    "class_path",
    "reward_funcs",
    "gtpo_runtime",
    "torch_compile_options",
    "ent_threshold",
    "pad_id",
    "evaluation",
    "samples",
    "every",
    "watch",
    "alarm",
    "wandb",
    "nonsense",
    "<<",
    "",
    "a.b",
    '"\\e[0m"',
]
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 10)
)
FLAGS = [
    "--run-name",
    "--model-name",
    "--dataset-name",
    "--dataset-subset",
    "--dataset-split",
    "--cuda",
    "--training.max_steps",
    "--training.generation_kwargs",
    "--env.A",
    "--gtpo-runtime.torch-compile-options.x.y",
    "--model",
    "--training.reward_weights",
    "--trainer.reward_funcs",
    "--dry-run",
    "--overwrite=1",
    "--",
    "--=",
    "--a.b.c",
    "-x",
    "x",
]


def recipe(dice: random.Random) -> tuple[str, list[str]]:
    """The text of a recipe file and the flags beside it."""
    kind, lines = dice.randrange(8), RECIPE.splitlines(keepends=True)
    if kind == 0:
        content = mutated(dice, RECIPE)
    elif kind == 1:
        content = text(dice, 30)
    elif kind == 2:
        content = "".join(
            f"{'  ' * dice.randrange(3)}{dice.choice(KEYS)}: {dice.choice(VALUES)}\n"
            for _ in range(dice.randrange(1, 8))
        )
    elif kind == 3:
        content = RECIPE + dice.choice(
            [
                BOMB,
                "training: *a\n",
                "x: [" + "[" * int(10 ** dice.uniform(0, 3.5)),
                f"a: {text(dice)}\n",
            ]
        )
    else:
        for _ in range(dice.randrange(1, 4)):
            place = dice.randrange(len(lines))
            key = (
                lines[place].partition(":")[0] if dice.random() < 0.7 else "  " + dice.choice(KEYS)
            )
            value = dice.choice(VALUES) if dice.random() < 0.8 else text(dice, 4)
            lines[place : place + dice.randrange(2)] = [f"{key}: {value}\n"]
        content = "".join(lines)
    words = []
    for _ in range(dice.choice([0, 0, 0, 1, 2])):
        words += [
            dice.choice(FLAGS),
            *([dice.choice([*VALUES, text(dice, 3)])] if dice.random() < 0.8 else []),
        ]
    return content, words


# ---- answers

ANSWERS = [
    "18",
    "1,200",
    "-5",
    "0.5",
    "\\frac{1}{2}",
    "\\frac12",
    "1\\frac{1}{2}",
    "3\\sqrt{2}",
    "x=5",
    "(1,2)",
    "[0,1)",
    "\\{1,2\\}",
    "50\\%",
    "\\$18",
    "18 dollars",
    "90^\\circ",
    "\\pi",
    "2\\pi r",
    "x^2+1",
    "\\text{Monday}",
    "\\text{(B)}",
    "12_5",
    "1.5 \\times 10^3",
    "\\infty",
    "(-\\infty, 3]",
    "\\begin{pmatrix}1\\\\2\\end{pmatrix}",
    "5:30",
    "2 million",
    "7!",
]
# no two of one value
EXPRESSIONS = [
    "\\sqrt{2}",
    "3\\sqrt{5}",
    "2\\pi",
    "x^2+1",
    "\\frac{\\sqrt{3}}{2}",
    "1+i",
    "e^3",
    "2x-7",
    "\\log 2",
    "n^2",
    "\\frac{\\pi}{4}",
]
WORDS = ["Monday", "\\text{Evelyn}", "\\text{(B)}"]


def answer_pair(dice: random.Random) -> tuple[str, str]:
    """An answer and a reference, each real, mutated or hostile."""
    one, other = (
        dice.choice(
            [
                lambda: dice.choice(ANSWERS),
                lambda: mutated(dice, dice.choice(ANSWERS), 2),
                lambda: text(dice, 8),
            ]
        )()
        for _ in range(2)
    )
    return one, dice.choice([other, other, one])


def number(dice: random.Random) -> Fraction:
    size = dice.choice([10, 100, 10_000, 10**7])
    value = Fraction(dice.randrange(-size if dice.random() < 0.2 else 0, size))
    return value if dice.random() < 0.7 else value / dice.choice([2, 4, 5, 10, 100])


def written(dice: random.Random, value: Fraction) -> str:
    """A plain way to write `value`."""
    if value.denominator == 1:
        return dice.choice(
            [str(value), f"{int(value):,}", str(value), f"{int(value)}.0", f"\\text{{{value}}}"]
        )
    decimal = f"{float(value):.4f}".rstrip("0")
    return dice.choice(
        [
            decimal,
            f"{value.numerator}/{value.denominator}",
            f"\\frac{{{value.numerator}}}{{{value.denominator}}}",
            decimal,
        ]
    )


RIGHT = [
    "{r}",
    " {r} ",
    "\n{r}\n",
    "${r}$",
    "\\boxed{{{r}}}",
    "**{r}**",
    "{r}.",
    "x = {r}",
    "\\(\\boxed{{{r}}}\\)",
    "\u200b{r}",
    "={r}",
    # the last six: for numbers
    "{r} apples",
    "the sum = {r}",
    "{r} = x",
    "f(2) = {r}",
    "x = {r} = {r}",
    "a+b = {r}",
]
WRONG = [  # {w} is a number that differs from the reference {r}
    "{w}",
    "${w}$",
    "\\boxed{{{w}}}",
    "**{w}**",
    "{w} dollars",
    "x = {w}",
    "{w} or {r}",
    "{r} or {w}",
    "{r}, {w}",
    "{w}, {r}",
    "({w}, {r})",
    "({r},{w})",
    "[{w}, {r}]",
    "\\{{{w}, {r}\\}}",
    "{w} = {r}",
    "{r} = {w}",
    "x = {w} = {r}",
    "{w}={w}={r}",
    "{r} \\neq {w}",
    "not {r}",
    "{w} < {r}",
    "{r} < x",
    "x > {r}",
    "\\boxed{{{w}}} \\boxed{{{r}}}",
    "\\boxed{{{r}}}, \\boxed{{{w}}}",
    "\\text{{{r} or }} {w}",
    "{r}; {w}",
    "{r}|{w}",
    "{r} \\cup {w}",
    "{r}\n{w}",
    "{w}\n\n{r}",
    "{r} {w}",
    "{w} {r}",
    "{r}\\\\{w}",
    "{r}\u2028{w}",
    "{r}\x00{w}",
    "\x1b[8m{w}\x1b[0m{r}",
    "{r}\u202e{w}",
    "answer: {w} (or {r})",
    "<b>{w}</b>",
    "<!--{w}-->{r}",
    "{r}<!--{w}-->",
    '{{"answer": {r}, "other": {w}}}',
    "${r}$ ${w}$",
    "{r}$ or ${w}",
    "{r} to {w}",
    "{w} to {r}",
    "{r}-{w}-{r}",
    "{r}...{w}",
    "{r}\\ldots {w}",
    "{r}\\pm {w}",
    "{w} \\pm {r}",
    "\\min({r}, {w}) or \\max({r}, {w})",
    "{r} and {w}",
    "either {r} or {w}",
    "{w}% = {r}",
    "{r}x",
    "{r}x + {w}",
    "{r}i",
    "{r}!!!!",
    "x \\in [{w}, {r}]",
    "f({r}) = {w}",
    "\\infty",
    "",
    "?",
    "all",
    "\\emptyset",
    "\\mathbb{{R}}",
    "nan",
    "{r}/0",
    "\\frac{{{r}}}{{0}}",
]


def wrong_answer(dice: random.Random, value: Fraction, reference: str) -> str:
    """A hostile wrapping of a number that is not `value`; it may well contain the reference."""
    other = value
    while abs(other) == abs(value):
        other = dice.choice(
            [
                number(dice),
                value + dice.choice([-1, 1]),
                value * 10,
                value + Fraction(1, 100),
                value * 1000 + 1,
                -value + 1,
                10 - value,
            ]
        )
    wrapping = dice.choice(
        [
            w
            for w in WRONG
            if value or w not in ("{r}x", "{r}i", "{r}x + {w}", "{w} \\pm {r}", "{r}!!!!")
        ]
    )
    return wrapping.format(w=written(dice, other), r=reference)


def completion(dice: random.Random, answer: str) -> str:
    """A completion in perfect format with `answer` in its answer block, unless that holds tags."""
    return (
        dice.choice(["", "Sure!\n", "x"])
        + f"<reasoning>\n{dice.choice(['', 'so', '18', chr(92) + 'boxed{18}'])}\n</reasoning>\n<answer>{answer}</answer>"
        + dice.choice(["", "\n", " "])
    )


def broken(dice: random.Random, answer: str) -> str:
    """A completion whose format is not perfect, with the right answer in many places."""
    return dice.choice(
        [
            f"<answer>{answer}</answer>",
            f"<reasoning>x</reasoning><answer>{answer}",
            f"<reasoning>x</reasoning><answer>{answer}</answer></answer>",
            f"<reasoning>x</reasoning><answer>{answer}</answer> bye",
            f"<reasoning>x<answer>{answer}</reasoning></answer>",
            answer,
            f"<answer>{answer}</answer><reasoning>x</reasoning>",
            f"<reasoning>x</reasoning><answer><answer>{answer}</answer>",
            f"<reasoning>x</reasoning><answer>1</answer><answer>{answer}</answer>",
            f"<reasoning><reasoning>x</reasoning><answer>{answer}</answer>",
            f"<reasoning>x</reasoning><ANSWER>{answer}</ANSWER>",
            f"<reasoning>x</reasoning>{answer}",
            f"<reasoning>x<answer>{answer}</answer></reasoning>",
            f"</reasoning>x<reasoning><answer>{answer}</answer>",
            f"<reasoning>x</reasoning>\n\\boxed{{{answer}}}",
        ]
    )


# ---- run directories


def completion_line(dice: random.Random, step: int, group: int, row: int) -> dict:
    """A line of completions.jsonl whose texts are hostile."""
    tokens = [text(dice, 3) or " " for _ in range(dice.randrange(1, 6))]
    count = len(tokens)
    return {
        "step": step,
        "rollout": step,
        "group": group,
        "row": row,
        "prompt": [{"role": text(dice, 2), "content": text(dice, 5)}],
        "completion": "".join(tokens),
        "answer": text(dice, 3),
        "reward": float(row % 2),
        "rewards": {text(dice, 2): 1.0},
        "advantage": row % 2 - 0.5,
        "entropy": dice.choice([0.2, 1e300, None]),
        "kept": True,
        "truncated": False,
        "ids": [dice.randrange(9) for _ in tokens],
        "tokens": tokens,
        "weights": [dice.choice([0.0, 1.0, 2.0]) for _ in tokens],
        "entropies": [0.1] * count,
        "prefix": dice.randrange(count + 1),
        "suffix": 0,
    }


def write_run(dice: random.Random, folder: Path, completions: int) -> None:
    """A run directory full of hostile texts; in one of four some of its files are damaged as
    well.
    """
    (folder / "evaluation").mkdir(parents=True)
    name = text(dice, 4).replace("\x00", "")
    values = {
        "run_name": name or "x",
        "model": {"model_name": text(dice, 3)},
        "dataset": {"name": "gsm8k"},
        "training": {"learning_rate": 1e-4},
    }
    (folder / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    (folder / "versions.json").write_text(
        json.dumps({text(dice, 2): text(dice, 2), "commit": text(dice, 2)})
    )
    lines = [
        json.dumps(
            completion_line(dice, 1 + i // 64, i // 8 % 8, i % 8), ensure_ascii=dice.random() < 0.5
        )
        for i in range(completions)
    ]
    if dice.random() < 0.25:
        lines = [mutated(dice, line, 1) if dice.random() < 0.02 else line for line in lines]
    (folder / "completions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    metric = text(dice, 3)
    history = [
        {"step": step, "reward": float(step), metric: 1.0, "alarm/" + text(dice, 2): text(dice, 2)}
        for step in range(1, 4)
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history, "max_steps": 3}))
    header = {
        "problems": 2,
        "samples": 1,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 1,
        "max_completion_length": 9,
        "weights": text(dice, 2),
        "prompts": text(dice, 2),
    }
    rows = [
        {
            "problem": i,
            "sample": 0,
            "prompt": [],
            "reference": text(dice, 2),
            "completion": text(dice, 4),
            "answer": text(dice, 2),
            "correct": True,
            "well_formed": True,
            "truncated": False,
            "tokens": 3,
        }
        for i in range(2)
    ]
    (folder / "evaluation" / "before.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [{"header": header}, *rows])
    )
    if dice.random() < 0.25:
        file = dice.choice(
            ["versions.json", "trainer_state.json", "evaluation/before.jsonl", "recipe.yaml"]
        )
        (folder / file).write_text(
            mutated(dice, (folder / file).read_text(encoding="utf-8"), 2), encoding="utf-8"
        )
