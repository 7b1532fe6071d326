"""Makes hostile input from a random generator.

It makes texts, recipes, wrong and right answers, completions and run directories. fuzz.py and
tests/test_fuzz.py use it. The same generator state gives the same input.
"""

import json
import random
from fractions import Fraction
from pathlib import Path

TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
# fmt: off
PIECES = [
    *TAGS, "<ANSWER>", "< answer>", "<answer >", "&lt;answer&gt;", "<reasoning><answer>",
    "</answer></answer>", "<script>window.hacked=1</script>", "</script>", "<!--", "-->", "]]>",
    "<img src=x onerror=alert(1)>", '" onmouseover="x', "'><svg/onload=x>", "javascript:alert(1)",
    "{{ 7*7 }}", "{% for x in y %}", "${x}", "%s%n", "\\", "\\\\", "\\u0000", "\\boxed{",
    "\\boxed{5}", "\\fbox 7", "\\frac{1}{2}", "\\frac1", "\\sqrt", "\\text{", "\\left(",
    "\\begin{pmatrix}1&2\\end{pmatrix}", "{", "}", "}}}}", "{{{{", "(", ")", "[", "]", "$", "$$",
    "####", "###", "# ", "^", "_", "^{^{", "9^9^9", "9" * 50, "1e999", "0/0", "1/0", "-", "--", "+",
    "=", "≤", "%", "!", "!!", ",", ".", "..", "1,2,3", "1,200", "3.14", "½", "∞", "-0", "nan",
    "inf", "None", "null", "true", "x", "\\pi", "π", "²", "１８", "٣", "१", "Ⅷ", "\u200b", "\u202e",
    "\u2066", "\ufeff", "\u2028", "\u0085", "\x00", "\x1b[2J", "\x1b]0;t\x07", "\r", "\n", "\t",
    "\x7f", "\x9b", "e\u0301" * 3, "𝄞", "👩‍👩‍👧", "\ufffd", "\U0010ffff", " ", "  ", "a", "or",
    "and", "not", "answer", "5", "18",
]
LONG = [
    "(", "{", "\\frac{", "<answer>", "9", " ", "\n", "\\boxed{", "^2", "a", "-", "1,", "$", "\\",
    "[", "x+", "!", "\\sqrt", "#", "<", "e\u0301", "1 ", "=", "%",
]
# fmt: on


def text(dice: random.Random, pieces: int = 12) -> str:
    """Up to `pieces` hostile pieces and random characters.

    One text in forty repeats a piece up to 20,000 times.
    """
    parts = [
        dice.choice(PIECES) if dice.random() < 0.8 else chr(_code(dice))
        for _ in range(dice.randrange(pieces))
    ]
    if dice.random() < 1 / 40:
        place = dice.randrange(len(parts) + 1)
        parts.insert(place, dice.choice(LONG) * int(10 ** dice.uniform(1, 4.3)))
    return "".join(parts)


def _code(dice: random.Random) -> int:
    """A code point. It is no surrogate, because no decoded completion contains one."""
    sizes = (128, 0x800, 0x10000, 0x110000)
    code = dice.choice([dice.randrange(size) for size in sizes])
    return code if not 0xD800 <= code < 0xE000 else 0xFFFD


def mutated(dice: random.Random, seed: str, times: int = 4) -> str:
    """`seed` with a few pieces removed, doubled, replaced or inserted."""
    for _ in range(dice.randrange(1, times + 1)):
        a, b = sorted(dice.randrange(len(seed) + 1) for _ in range(2))
        b = min(b, a + 30)
        middle = dice.choice(["", seed[a:b] * 2, text(dice, 3), text(dice, 3) + seed[a:b]])
        seed = seed[:a] + middle + seed[b:]
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
# fmt: off
VALUES = [
    "1e999", "-1", "0", "1" * 400, "9" * 5000, ".nan", "-.inf", "0x", "0b1", "1_000", "2001-01-01",
    "2001-99-99", "12:30:45", "null", "~", "yes", "[]", "{}", "[[]]", "[1, [2, [3]]]",
    "{a: {b: c}}", "{1: 2}", "{null: 1}", "{[a]: 1}", "? a", "!!int x", "!!float x", "!!bool x",
    "!!binary x", "!!binary '%%'", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str 5",
    "!!null x", "!!timestamp x", "!!python/object/apply:os.system [x]", "!x y", "&a [*a]", "*a",
    "<<: *a", "'a", '"a', "|\n a", ">-\n a", '"\\ud800"', '"\\0"', '"\\e[31m"', "@", "`", "%",
    "a.b", "a:b", "os.system", "os.path", "__main__.x", "reward_math.nothing", "gtpo.shaping",
    "..a", "a..b", "é.x", "/dev/null", "../../x", "hf_abcdefghijklmnopqrst", "8/12", "8/0", "none",
    "group", "auto", "wandb", "[wandb, none]", "constant", "train[:0]", "train[", "test", "-0.0",
    "1e-400", "true",
]
KEYS = [
    "run_name", "output_root", "env", "model", "model_name", "adapter", "max_seq_length",
    "max_prompt_length", "lora_rank", "lora_alpha", "target_modules", "chat_template", "dataset",
    "name", "path", "subset", "subsets", "split", "system_instruction", "training", "learning_rate",
    "warmup_ratio", "num_generations", "optimizer", "optim", "per_device_train_batch_size",
    "gradient_accumulation_steps", "generation_batch_size", "steps_per_generation", "max_steps",
    "num_train_epochs", "report_to", "beta", "generation_kwargs", "reward_weights", "temperature",
    "seed", "lr_scheduler_type", "output_dir", "hub_token", "trainer", "class_path", "reward_funcs",
    "gtpo_runtime", "torch_compile_options", "ent_threshold", "pad_id", "evaluation", "samples",
    "every", "watch", "alarm", "wandb", "nonsense", "<<", "", "a.b", '"\\e[0m"',
]
# fmt: on
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 10)
)
# fmt: off
FLAGS = [
    "--run-name", "--model-name", "--dataset-name", "--dataset-subset", "--dataset-split", "--cuda",
    "--training.max_steps", "--training.generation_kwargs", "--env.A",
    "--gtpo-runtime.torch-compile-options.x.y", "--model", "--training.reward_weights",
    "--trainer.reward_funcs", "--dry-run", "--overwrite=1", "--", "--=", "--a.b.c", "-x", "x",
]
# fmt: on


def recipe(dice: random.Random) -> tuple[str, list[str]]:
    """The text of a recipe file, and the words of a command line."""
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
        nested = "x: [" + "[" * int(10 ** dice.uniform(0, 3.5))
        content = RECIPE + dice.choice([BOMB, "training: *a\n", nested, f"a: {text(dice)}\n"])
    else:
        for _ in range(dice.randrange(1, 4)):
            place = dice.randrange(len(lines))
            present = dice.random() < 0.7
            key = lines[place].partition(":")[0] if present else "  " + dice.choice(KEYS)
            value = dice.choice(VALUES) if dice.random() < 0.8 else text(dice, 4)
            lines[place : place + dice.randrange(2)] = [f"{key}: {value}\n"]
        content = "".join(lines)
    words = []
    for _ in range(dice.choice([0, 0, 0, 1, 2])):
        words.append(dice.choice(FLAGS))
        if dice.random() < 0.8:
            words.append(dice.choice([*VALUES, text(dice, 3)]))
    return content, words


# ---- answers

# fmt: off
ANSWERS = [
    "18", "1,200", "-5", "0.5", "\\frac{1}{2}", "\\frac12", "1\\frac{1}{2}", "3\\sqrt{2}", "x=5",
    "(1,2)", "[0,1)", "\\{1,2\\}", "50\\%", "\\$18", "18 dollars", "90^\\circ", "\\pi", "2\\pi r",
    "x^2+1", "\\text{Monday}", "\\text{(B)}", "12_5", "1.5 \\times 10^3", "\\infty",
    "(-\\infty, 3]", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "5:30", "2 million", "7!",
]
EXPRESSIONS = [  # no two have the same value
    "\\sqrt{2}", "3\\sqrt{5}", "2\\pi", "x^2+1", "\\frac{\\sqrt{3}}{2}", "1+i", "e^3", "2x-7",
    "\\log 2", "n^2", "\\frac{\\pi}{4}",
]
# fmt: on
WORDS = ["Monday", "\\text{Evelyn}", "\\text{(B)}"]


def answer_pair(dice: random.Random) -> tuple[str, str]:
    """An answer and a reference, each real, mutated or hostile."""
    generators = [
        lambda: dice.choice(ANSWERS),
        lambda: mutated(dice, dice.choice(ANSWERS), 2),
        lambda: text(dice, 8),
    ]
    one, other = (dice.choice(generators)() for _ in range(2))
    return one, dice.choice([other, other, one])


def number(dice: random.Random) -> Fraction:
    """An integer or a short decimal, of any size up to 10 million."""
    size = dice.choice([10, 100, 10_000, 10**7])
    value = Fraction(dice.randrange(-size if dice.random() < 0.2 else 0, size))
    return value if dice.random() < 0.7 else value / dice.choice([2, 4, 5, 10, 100])


def written(dice: random.Random, value: Fraction) -> str:
    """`value` in one of several plain notations."""
    if value.denominator == 1:
        plain, grouped, decimal = str(value), f"{int(value):,}", f"{int(value)}.0"
        return dice.choice([plain, grouped, plain, decimal, f"\\text{{{value}}}"])
    above, below = value.numerator, value.denominator
    decimal = f"{float(value):.4f}".rstrip("0")
    return dice.choice([decimal, f"{above}/{below}", f"\\frac{{{above}}}{{{below}}}", decimal])


# fmt: off
RIGHT = [  # {r} is the reference; the last six are for numbers
    "{r}", " {r} ", "\n{r}\n", "${r}$", "\\boxed{{{r}}}", "**{r}**", "{r}.", "x = {r}",
    "\\(\\boxed{{{r}}}\\)", "\u200b{r}", "={r}", "{r} apples", "the sum = {r}", "{r} = x",
    "f(2) = {r}", "x = {r} = {r}", "a+b = {r}",
]
WRONG = [  # {w} is a number that differs from the reference {r}
    "{w}", "${w}$", "\\boxed{{{w}}}", "**{w}**", "{w} dollars", "x = {w}", "{w} or {r}",
    "{r} or {w}", "{r}, {w}", "{w}, {r}", "({w}, {r})", "({r},{w})", "[{w}, {r}]",
    "\\{{{w}, {r}\\}}", "{w} = {r}", "{r} = {w}", "x = {w} = {r}", "{w}={w}={r}", "{r} \\neq {w}",
    "not {r}", "{w} < {r}", "{r} < x", "x > {r}", "\\boxed{{{w}}} \\boxed{{{r}}}",
    "\\boxed{{{r}}}, \\boxed{{{w}}}", "\\text{{{r} or }} {w}", "{r}; {w}", "{r}|{w}",
    "{r} \\cup {w}", "{r}\n{w}", "{w}\n\n{r}", "{r} {w}", "{w} {r}", "{r}\\\\{w}", "{r}\u2028{w}",
    "{r}\x00{w}", "\x1b[8m{w}\x1b[0m{r}", "{r}\u202e{w}", "answer: {w} (or {r})", "<b>{w}</b>",
    "<!--{w}-->{r}", "{r}<!--{w}-->", '{{"answer": {r}, "other": {w}}}', "${r}$ ${w}$",
    "{r}$ or ${w}", "{r} to {w}", "{w} to {r}", "{r}-{w}-{r}", "{r}...{w}", "{r}\\ldots {w}",
    "{r}\\pm {w}", "{w} \\pm {r}", "\\min({r}, {w}) or \\max({r}, {w})", "{r} and {w}",
    "either {r} or {w}", "{w}% = {r}", "{r}x", "{r}x + {w}", "{r}i", "{r}!!!!", "x \\in [{w}, {r}]",
    "f({r}) = {w}", "\\infty", "", "?", "all", "\\emptyset", "\\mathbb{{R}}", "nan", "{r}/0",
    "\\frac{{{r}}}{{0}}",
    # words and signs that may change the value, hedges, and other units
    "{r} or six", "{r} but maybe thirteen", "either {r} or nine", "{r} less than twenty",
    "{r} point five", "{r} and a half", "{r} minus one", "{r} plus two", "at least {r}",
    "more than {r}", "{r} below zero", "maybe {r}", "not {r} but {w}", "{r} apples, {w} pears",
    "{r} out of {w}", "{r} per {w}", "{r}^{{{w}}}x", "{r}_3", "\\{{x \\mid x > {r}\\}}",
    "x \\ne {r}", "maybe x = {r}", "if x = {r}",
]
SCALED = [  # each changes the value of a reference that is not zero
    "{r} thousand", "{r}k", "{r} million", "${r}M", "${r} bn", "{r} dozen", "{r} hundred eggs",
    "{r} lakhs", "{r} crore", "{r} tens", "{r} hundredths", "{r} fifths", "{r} thirds of it",
    "{r} doubled", "{r} squared", "{r} halved", "{r} times two", "{r} tenth", "{r}e3", "{r}!!!!",
]
# fmt: on


def wrong_answer(dice: random.Random, value: Fraction, reference: str) -> str:
    """A hostile form around a number that differs from `value`; it may contain the reference."""
    other = value
    while abs(other) == abs(value):
        numbers = [number(dice), value + dice.choice([-1, 1])]
        numbers += [value * 10, value + Fraction(1, 100), value * 1000 + 1, -value + 1, 10 - value]
        other = dice.choice(numbers)
    if value not in (0, 1, 2) and dice.random() < 0.2:
        return dice.choice(SCALED).format(r=reference)
    equal_at_zero = ("{r}x", "{r}i", "{r}x + {w}", "{w} \\pm {r}", "{r}!!!!")
    form = dice.choice([form for form in WRONG if value or form not in equal_at_zero])
    return form.format(w=written(dice, other), r=reference)


def completion(dice: random.Random, answer: str) -> str:
    """A completion in perfect format around `answer`, unless `answer` contains tags."""
    before = dice.choice(["", "Sure!\n", "x"])
    thought = dice.choice(["", "so", "18", "\\boxed{18}"])
    after = dice.choice(["", "\n", " "])
    return f"{before}<reasoning>\n{thought}\n</reasoning>\n<answer>{answer}</answer>{after}"


def broken(dice: random.Random, answer: str) -> str:
    """A completion in a format that is not perfect, with the right answer somewhere."""
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
    """Writes a run directory full of hostile texts; in one of four, some files are damaged."""
    (folder / "evaluation").mkdir(parents=True)
    name = text(dice, 4).replace("\x00", "")
    values = {
        "run_name": name or "x",
        "model": {"model_name": text(dice, 3)},
        "dataset": {"name": "gsm8k"},
        "training": {"learning_rate": 1e-4},
    }
    (folder / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    versions = {text(dice, 2): text(dice, 2), "commit": text(dice, 2)}
    (folder / "versions.json").write_text(json.dumps(versions))
    lines = []
    for i in range(completions):
        line = completion_line(dice, step=1 + i // 64, group=i // 8 % 8, row=i % 8)
        lines.append(json.dumps(line, ensure_ascii=dice.random() < 0.5))
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
        names = ["versions.json", "trainer_state.json", "evaluation/before.jsonl", "recipe.yaml"]
        file = folder / dice.choice(names)
        file.write_text(mutated(dice, file.read_text(encoding="utf-8"), 2), encoding="utf-8")
