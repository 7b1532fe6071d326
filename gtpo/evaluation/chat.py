"""Talk to a policy in the terminal: completions are printed as they are drawn, and the conversation
is kept.
"""

import sys

from gtpo.models.generation import Sampling, completion_seed, decoded_completion, generate_options
from gtpo.system.safe_text import printable

COMMANDS = "/reset begins a new conversation, /exit or Ctrl-D leaves, Ctrl-C stops a completion"


def chat(
    policy,
    sampling: Sampling,
    *,
    context: int,
    system_instruction: str | None,
    chat_template_kwargs: dict | None = None,
):
    """Read lines from stdin until /exit or its end, and print what the policy says to each;
    `context` is in tokens.
    """
    opening = [{"role": "system", "content": system_instruction}] if system_instruction else []
    messages, turn, options = list(opening), 0, chat_template_kwargs or {}
    print(f"({COMMANDS})", file=sys.stderr)
    while (line := _read()) is not None:
        if line in ("", "/reset"):
            messages = messages if line == "" else list(opening)
            continue
        if line.startswith("/"):
            if line == "/exit":
                return
            print(f"(there is no {line.split()[0]}; {COMMANDS})", file=sys.stderr)
            continue
        turn += 1
        asked = [*messages, {"role": "user", "content": line}]
        text = policy.tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True, **options
        )
        ids = policy.tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        if (left := context - ids.shape[1]) < 1:
            print(
                f"(the conversation has {ids.shape[1]} tokens with this line, and the model takes"
                f" {context}: say less, or /reset)",
                file=sys.stderr,
            )
            continue
        limit = min(left, sampling.max_completion_length)
        try:
            said = _stream(
                policy,
                ids,
                sampling._replace(max_completion_length=limit),
                completion_seed(sampling.seed, turn, 0),
            )
        except KeyboardInterrupt:
            print("\n(stopped; this line and its answer are forgotten)", file=sys.stderr)
            continue
        if said.truncated:
            print(f"(cut after {said.tokens} tokens)", file=sys.stderr)
        messages = [*asked, {"role": "assistant", "content": said.text}]


def _read() -> str | None:
    """The next line without its white space; None at the end, or for Ctrl-C at the prompt."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
        # bytes that are no UTF-8 arrive as lone surrogates
        return line.encode("utf-8", "replace").decode().strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _stream(policy, ids, sampling: Sampling, seed: int):
    """Draw a completion and print it token by token."""
    import torch
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False):
            super().on_finalized_text(printable(text), stream_end)

    with torch.no_grad(), policy.generating() as model:
        ids = ids.to(model.device)
        drawn = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=Streamer(policy.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **generate_options(policy.tokenizer, sampling, [seed], model.device),
        )
    return decoded_completion(drawn[0, ids.shape[1] :].tolist(), policy.tokenizer)
