"""What the embedded tasks share: a tokenizer, a tiny Llama, and a supervised warm start."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
PAD, EOS = "<|pad|>", "<|end|>"
SPECIAL = [PAD, EOS, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor"
    " %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# tokens, far more than these problems need, so that real datasets can be tried too
CONTEXT = 8192
BATCH, LEARNING_RATE, SEED = 64, 3e-3, 0


def write_problems(problems: Iterable[Any], path: Path) -> None:
    """Write one problem per line, in GSM8K's schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for problem in problems:
            reasoning, result = problem.steps()
            row = {"question": problem.question, "answer": f"{reasoning}\n#### {result}"}
            file.write(json.dumps(row) + "\n")


def make_tokenizer(
    corpus: list[str], *, digits: int, vocabulary: int, tags: list[str]
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for any text, learned from `corpus`, with a chat template.

    It has at most `vocabulary` tokens. Numbers are cut into groups of `digits`. Each of `tags` is
    one token, but not a special one, because rewards read text without special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"[0-9]{{1,{digits}}}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    learned, alphabet = vocabulary - len(SPECIAL) - len(tags), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=learned, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama, with 192,320 parameters for the demo's tokenizer.

    Smaller models learn faster per second on a CPU.
    """
    torch.manual_seed(SEED)
    ends = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            **ends,
        )
    )
    model.generation_config = GenerationConfig(**ends)
    return model


def draw_batches(
    problems: list[Any],
    tokenizer: PreTrainedTokenizerFast,
    draw_target: Callable[[Any, random.Random], str],
    system_prompt: str,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of prompt and target, without an end.

    `labels` has the ids of the target and its end token, and -100 elsewhere, which the loss
    ignores.
    """
    rng = random.Random(SEED)
    while True:
        rows = []
        for problem in rng.sample(problems, BATCH):
            messages = [
                {"role": "system", "content": system_prompt},
                {"role": "user", "content": problem.question},
            ]
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            prompt, target = (
                tokenizer.encode(text),
                tokenizer.encode(draw_target(problem, rng) + EOS),
            )
            ignored = [-100] * len(prompt)
            rows.append((torch.tensor(prompt + target), torch.tensor(ignored + target)))
        input_ids, labels = zip(*rows, strict=True)
        yield {
            "input_ids": pad_sequence(
                input_ids, batch_first=True, padding_value=tokenizer.pad_token_id
            ),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }


def warm_start(model: LlamaForCausalLM, batches: Iterator[dict], steps: int) -> list[float]:
    """Train the model on `steps` batches; returns the loss of every step."""
    # OneCycleLR also changes beta1 during training.
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
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
