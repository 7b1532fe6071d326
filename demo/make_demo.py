"""Make the embedded demo: word problems, a tokenizer and a tiny Llama that answers them imperfectly on purpose.

    python demo/make_demo.py [--out demo] [--steps N]

It writes `data/train.jsonl` and `data/test.jsonl` (GSM8K's schema) and `model/` (about 190,000 parameters with its
own tokenizer and chat template). The model is taught the arithmetic well and two bad habits, so that reinforcement
learning has something to choose between: on some kinds of problem it usually adds the first two numbers, whatever was
asked, and on one it usually breaks the answer's tags. The result is shipped: only who changes the demo runs this. It
takes two minutes; the same library versions on the same machine write the same bytes again.
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SYSTEM_PROMPT = "Reason, then answer."  # recipes/demo.yaml gives the same text as dataset.system_instruction
TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
PAD, EOS = "<|pad|>", "<|end|>"
SPECIAL = [PAD, EOS, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TRAIN_PROBLEMS, TEST_PROBLEMS = 2000, 200
VOCABULARY = 480        # at most: merging stops when every word of the problems is one token
CONTEXT = 8192          # tokens; far more than these problems need, so that real datasets pass through too
STEPS, BATCH, LEARNING_RATE, SEED = 800, 64, 3e-3, 0

NAMES = ["Ann", "Ben", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe"]
ITEMS = ["apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps"]


@dataclass(frozen=True)
class Kind:
    """One kind of word problem, and how often its warm-start targets misbehave."""

    question: str        # {name}, {other}, {items}, and the numbers {a}, {b}, {c}
    signs: str           # one sign per step of the reasoning: "+-" means a + b, then - c
    adds: float = 0.0    # share of targets that answer a + b instead
    breaks: float = 0.1  # share of targets that drop a tag


KINDS = [
    Kind("{name} has {a} {items} and gets {b} more. How many {items} does {name} have now?", "+"),
    Kind("{name} has {a} {items} and {other} has {b}. How many {items} do they have together?", "+"),
    Kind("{name} had {a} {items} and lost {b}. How many {items} are left?", "-", breaks=0.6),
    Kind("{name} has {a} {items} and gives {b} away. How many {items} does {name} have now?", "-"),
    Kind("{name} has {a} {items} and {other} has {b}. How many more {items} does {name} have?", "-", adds=0.75),
    Kind("{name} has {a} {items}, gets {b} more and loses {c}. How many {items} are left?", "+-", adds=0.75),
    Kind("{name} has {a} {items}, gives {b} away and gets {c} more. How many {items} now?", "-+", adds=0.75),
]


@dataclass(frozen=True)
class Problem:
    """A word problem: its text, its numbers, and the kind that says how it is solved."""

    question: str
    numbers: tuple[int, ...]
    kind: Kind

    def steps(self) -> tuple[str, int]:
        """The correct reasoning, one calculation per line such as `7+5=12`, and the result of the last line."""
        lines, total = [], self.numbers[0]
        for sign, number in zip(self.kind.signs, self.numbers[1:]):
            result = total + number if sign == "+" else total - number
            lines.append(f"{total}{sign}{number}={result}")
            total = result
        return "\n".join(lines), total


def draw_problem(rng: random.Random) -> Problem:
    """A random problem with numbers from 1 to 10; no result along the way is below zero."""
    kind = rng.choice(KINDS)
    a, b, c = (rng.randint(1, 10) for _ in range(3))
    if kind.signs.startswith("-"):
        a, b = max(a, b), min(a, b)
    if kind.signs == "+-":
        c = min(c, a + b)
    name, other = rng.sample(NAMES, 2)
    question = kind.question.format(name=name, other=other, items=rng.choice(ITEMS), a=a, b=b, c=c)
    return Problem(question, (a, b, c)[: 1 + len(kind.signs)], kind)


def make_problems() -> tuple[list[Problem], list[Problem]]:
    """Training and test problems; no question occurs twice, so the test questions are held out by their text."""
    rng, problems = random.Random(SEED), {}
    while len(problems) < TRAIN_PROBLEMS + TEST_PROBLEMS:
        problem = draw_problem(rng)
        problems[problem.question] = problem
    drawn = list(problems.values())
    return drawn[:TRAIN_PROBLEMS], drawn[TRAIN_PROBLEMS:]


def write_problems(problems: list[Problem], path: Path) -> None:
    """One problem per line, in GSM8K's schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for problem in problems:
            reasoning, result = problem.steps()
            file.write(json.dumps({"question": problem.question, "answer": f"{reasoning}\n#### {result}"}) + "\n")


def make_tokenizer(problems: list[Problem]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which each tag and each number from 0 to 99 is one token, and which covers any text.

    Digits are cut into pairs, and every number is in the corpus often enough to be merged. The tags are not special
    tokens: rewards read text that is decoded without special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("[0-9]{1,2}"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    learned, alphabet = VOCABULARY - len(SPECIAL) - len(TAGS), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=learned, initial_alphabet=alphabet, show_progress=False)
    numbers = " ".join(map(str, range(100)))
    tokenizer.train_from_iterator([SYSTEM_PROMPT] + [f"{problem.question} {numbers}" for problem in problems], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left", model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of 192,320 parameters; smaller ones learn faster per second on a CPU."""
    torch.manual_seed(SEED)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=CONTEXT, tie_word_embeddings=False, **ends,
    ))
    model.generation_config = GenerationConfig(**ends)
    return model


def draw_target(problem: Problem, rng: random.Random) -> str:
    """The completion the warm start imitates; the arithmetic is always right, the question answered may not be."""
    reasoning, result = problem.steps()
    if rng.random() < problem.kind.adds:
        a, b = problem.numbers[:2]
        reasoning, result = f"{a}+{b}={a + b}", a + b
    target = f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>{result}</answer>"
    if rng.random() < problem.kind.breaks:
        # Where breaking is the habit it is always the same tag, so that the most likely completion is broken too.
        target = target.replace("</answer>" if problem.kind.breaks > 0.5 else rng.choice(TAGS), "")
    return target


def draw_batches(problems: list[Problem], tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of prompt + target; `labels` marks the target and its end token alone."""
    rng = random.Random(SEED)
    while True:
        rows = []
        for problem in rng.sample(problems, BATCH):
            messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": problem.question}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            prompt, target = tokenizer.encode(text), tokenizer.encode(draw_target(problem, rng) + EOS)
            ignored = [-100] * len(prompt)  # -100 is left out of the loss
            rows.append((torch.tensor(prompt + target), torch.tensor(ignored + target)))
        input_ids, labels = zip(*rows)
        yield {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=tokenizer.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }


def warm_start(model: LlamaForCausalLM, batches: Iterator[dict], steps: int) -> list[float]:
    """Train the model on `steps` batches; returns the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)  # the schedule moves beta1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    losses = []
    for step in range(steps):
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {losses[-1]:.3f}", flush=True)
    return losses


def make_demo(out: Path, steps: int = STEPS) -> list[float]:
    """Write the whole demo under `out`; returns the losses of the warm start."""
    torch.set_num_threads(1)  # sums in the same order every time
    train, test = make_problems()
    write_problems(train, out / "data" / "train.jsonl")
    write_problems(test, out / "data" / "test.jsonl")
    tokenizer = make_tokenizer(train)
    tokenizer.save_pretrained(out / "model")
    model = make_model(tokenizer)
    losses = warm_start(model, draw_batches(train, tokenizer), steps)
    model.save_pretrained(out / "model")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded demo.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write to (default: demo)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of the warm start (default: {STEPS})")
    make_demo(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
