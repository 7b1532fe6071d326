"""Talk to a policy in the terminal. Completions appear token by token; the conversation is kept."""

import sys

from gtpo.answers.problem import SystemRole, with_system_message
from gtpo.models.generation import (
    SampledCompletion,
    Sampling,
    completion_seed,
    decoded_completion,
    generate_options,
)
from gtpo.models.prompt import opened_thoughts, prompt_opening, prompt_text
from gtpo.system.safe_text import printable

COMMANDS = "/reset starts a new conversation, /exit or Ctrl-D leaves, Ctrl-C stops a completion"


def chat(
    policy,
    sampling: Sampling,
    *,
    context: int,
    system_instruction: str | None,
    system_role: SystemRole = "system",
    chat_template_kwargs: dict | None = None,
) -> None:
    """Reads lines from stdin until /exit or the end of input, and prints the policy's answers.

    `context` is the most tokens that a conversation may have, its next completion included. What
    the prompt opens, such as `<reasoning>`, is the beginning of the answer.
    """
    messages, turn = [], 0
    _note(COMMANDS)
    while (line := _read_line()) is not None:
        if line == "":
            continue
        if line == "/exit":
            return
        if line == "/reset":
            messages = []
            continue
        if line.startswith("/"):
            _note(f"there is no {line.split()[0]}; {COMMANDS}")
            continue
        turn += 1
        with_line = [*messages, {"role": "user", "content": line}]
        prompt = with_system_message(with_line, system_instruction, system_role)
        ids = _token_ids(policy.tokenizer, prompt, chat_template_kwargs)  # (1, T)
        opening = _opening(policy.tokenizer, prompt, chat_template_kwargs)
        tokens_left = context - ids.shape[1]
        if tokens_left < 1:
            _note(
                f"the conversation has {ids.shape[1]} tokens with this line, and the model takes"
                f" {context}: write less, or use /reset"
            )
            continue
        length = min(tokens_left, sampling.max_completion_length)
        try:
            answer = _stream(
                policy,
                ids,
                sampling._replace(max_completion_length=length),
                completion_seed(sampling.seed, turn, 0),
                opening,
            )
        except KeyboardInterrupt:
            print(file=sys.stderr)
            _note("stopped; this line and its answer are not part of the conversation")
            continue
        if answer.truncated:
            _note(f"cut off after {answer.tokens} tokens")
        messages = [*with_line, {"role": "assistant", "content": opening + answer.text}]


def _note(sentence: str) -> None:
    print(f"({sentence})", file=sys.stderr)


def _read_line() -> str | None:
    """The next line without surrounding white space; None at the end of input or after Ctrl-C."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    # Bytes that are not UTF-8 arrive as lone surrogates, which no tokenizer takes.
    return line.encode("utf-8", "replace").decode().strip()


def _token_ids(tokenizer, messages: list[dict], chat_template_kwargs: dict | None):
    """The conversation after the chat template, (1, T)."""
    text = prompt_text(tokenizer, messages, chat_template_kwargs)
    # verbose=False: the caller checks the length, so the tokenizer need not warn.
    return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids


def _opening(tokenizer, messages: list[dict], chat_template_kwargs: dict | None) -> str:
    """What the prompt has already written of the answer, and of the model's thoughts."""
    return prompt_opening(tokenizer, messages, chat_template_kwargs) or opened_thoughts(
        tokenizer, messages, chat_template_kwargs
    )


def _stream(policy, ids, sampling: Sampling, seed: int, opening: str) -> SampledCompletion:
    """Draws a completion of `ids`, (1, T), and prints it after `opening`, token by token."""
    import torch
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False):
            super().on_finalized_text(printable(text), stream_end)

    print(printable(opening), end="", flush=True)
    with torch.no_grad(), policy.generating() as model:
        ids = ids.to(model.device)
        sequence = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=Streamer(policy.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **generate_options(policy.tokenizer, sampling, [seed], model.device),
        )[0]
    return decoded_completion(sequence[ids.shape[1] :].tolist(), policy.tokenizer)
