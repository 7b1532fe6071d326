"""The prompt as the model will read it: its system message, its checks, and what it opens.

A chat template turns messages into the text of a prompt. It is a program of the model's author. It
may refuse a system message, leave one out, need a flag, or begin the answer by itself.
"""

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from gtpo.answers.problem import SystemRole, with_system_message
from gtpo.errors import RecipeError
from gtpo.models.base_model import read_config
from gtpo.recipe import Recipe
from gtpo.recipe.sections import ModelSection

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]  # each with `role` and `content`

QUESTION, ANSWER = "2+2=?", "It is 4."  # of the messages with which templates are tried
SYSTEM_KEY, ROLE_KEY = "dataset.system_instruction", "dataset.system_role"
TEMPLATE_KEY, OPTIONS_KEY = "model.chat_template", "training.chat_template_kwargs"
# what transformers 5.17.0 gives a template beside the special tokens, in render_jinja_template
GIVEN_TO_TEMPLATES = {"messages", "tools", "documents", "add_generation_prompt"} | {
    *("raise_exception", "strftime_now", "continue_final_message"),
}
OUR_TAG = re.compile("</?(?:reasoning|answer)>")
# a tag around a model's thoughts: <think>, [THINK], <|START_THINKING|>, <|end_of_thought|>
THOUGHT_TAG = re.compile(r"[<\[◁][^<>\[\]◁▷\s]*(?:think|thought|reason)[^<>\[\]◁▷\s]*[>\]▷]", re.I)
CLOSES = re.compile(r"/|end", re.I)


# ---- text


def prompt_text(
    tokenizer, messages: Messages, options: dict | None = None, *, generation_prompt: bool = True
) -> str:
    """`messages` after the chat template, as text.

    `options` are those of `training.chat_template_kwargs`. Without `generation_prompt`, the
    template does not begin a turn of the assistant.
    """
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt, **(options or {})
    )


def generation_prompt(tokenizer, messages: Messages, options: dict | None = None) -> str:
    """The end of the prompt, which the template adds after the last message.

    It also ends the user's turn if the template has no separate generation prompt.
    """
    return _end(tokenizer, messages, options)[0]


def _end(tokenizer, messages: Messages, options: dict | None) -> tuple[str, bool]:
    """`generation_prompt`, and whether all of it begins the assistant's turn."""
    whole = before = prompt_text(tokenizer, messages, options)
    with contextlib.suppress(Exception):  # a template for prompts alone
        before = prompt_text(tokenizer, messages, options, generation_prompt=False)
    if whole.startswith(before) and whole != before:
        return whole[len(before) :], True
    last = messages[-1]["content"].strip()
    return (whole.rpartition(last)[2] if last in whole else ""), False


def prompt_opening(tokenizer, messages: Messages, options: dict | None = None) -> str:
    """What the prompt has already written of the answer, from the first of our tags on.

    It is `<reasoning>` and a line feed, for example, where the template opens the reasoning. It is
    "" for most templates.
    """
    end, is_assistants = _end(tokenizer, messages, options)
    opened = [tag for tag in OUR_TAG.finditer(end) if not CLOSES.search(tag[0])]
    *_, last = [None, *OUR_TAG.finditer(end)]
    # After the user's text there may be words about the format. All their tags are closed.
    if not opened or not is_assistants and CLOSES.search(last[0]):
        return ""
    return end[opened[0].start() :]


def opened_thoughts(tokenizer, messages: Messages, options: dict | None = None) -> str:
    """The prompt's end from a tag on that opens the model's thoughts, such as `<think>`; else "".

    The tags of `prompt_opening` are not meant.
    """
    end = generation_prompt(tokenizer, messages, options)
    *_, last = [None, *THOUGHT_TAG.finditer(end)]
    if last is None or OUR_TAG.match(last[0]) or CLOSES.search(last[0]):
        return ""
    return end[last.start() :]


# ---- checks of a template


def check_template(
    tokenizer,
    instruction: str | None,
    role: SystemRole = "system",
    options: dict | None = None,
    *,
    strict: bool = True,
) -> None:
    """Raises RecipeError if the chat template does not print what the model must read.

    It is tried with a system message `instruction`, a question, and `options`, those of
    `training.chat_template_kwargs`. A warning says so if it begins the model's thoughts. What makes
    prompts worse, but still possible, is a warning as well unless `strict`.
    """
    messages = with_system_message([{"role": "user", "content": QUESTION}], instruction, role)
    text = _tried(tokenizer, messages, options)
    if QUESTION not in text:
        raise RecipeError(
            TEMPLATE_KEY,
            "it leaves out what the user says; it must print each message's content",
        )
    for mistake in _damages(tokenizer, messages, text, options):
        if strict:
            raise mistake
        logger.warning("[GTPO] %s", mistake)
    if thoughts := opened_thoughts(tokenizer, messages, options):
        logger.warning("[GTPO] %s", _about_thoughts(tokenizer, messages, options, thoughts))
    reads = _flags(tokenizer)
    if reads is not None and (unread := sorted((options or {}).keys() - reads)):
        known = f"; it reads {', '.join(sorted(reads))}" if reads else ""
        logger.warning(
            "[GTPO] %s: the chat template does not read %s%s", OPTIONS_KEY, ", ".join(unread), known
        )


def _tried(tokenizer, messages: Messages, options: dict | None) -> str:
    """The prompt's text; raises RecipeError if the template fails, with what would help."""
    try:
        return prompt_text(tokenizer, messages, options)
    except Exception as error:  # a template is a program, and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        failure = error
    if messages[0]["role"] == "system" and _works(tokenizer, messages[1:], options):
        raise RecipeError(
            SYSTEM_KEY,
            f"the chat template refuses a system message ({reason}); set {ROLE_KEY} to user, or"
            f" {SYSTEM_KEY} to null",
        ) from failure
    for flag in _possible_flags(tokenizer, options):
        if _works(tokenizer, messages, {**(options or {}), **flag}):
            raise RecipeError(
                OPTIONS_KEY,
                f"the chat template needs a flag ({reason}); set it to {_as_yaml(flag)}",
            ) from failure
    unset = sorted((_flags(tokenizer) or set()) - (options or {}).keys())
    hint = f"; it reads {', '.join(unset)}, which {OPTIONS_KEY} can set" if unset else ""
    raise RecipeError(
        TEMPLATE_KEY, f"it is no Jinja template that works ({reason}){hint}"
    ) from failure


def _works(tokenizer, messages: Messages, options: dict | None) -> bool:
    """Whether the template takes the messages, and prints the last one."""
    try:
        return messages[-1]["content"] in prompt_text(tokenizer, messages, options)
    except Exception:  # as above
        return False


def _damages(
    tokenizer, messages: Messages, text: str, options: dict | None
) -> Iterator[RecipeError]:
    """What the template does to a prompt without failing, as an error each."""
    if _leaves_system_message_out(tokenizer, messages, options):
        yield RecipeError(
            SYSTEM_KEY,
            "the chat template leaves the system message out, so the model would not read it;"
            f" set {ROLE_KEY} to user, or {SYSTEM_KEY} to null",
        )
    if missing := _missing_header(tokenizer, messages, text, options):
        yield RecipeError(
            TEMPLATE_KEY,
            "the template ignores add_generation_prompt, so prompts lack the beginning of the"
            f" answer, {missing!r}; add {{% if add_generation_prompt %}}{{{{ {missing!r} }}}}"
            "{% endif %} at its end",
        )


def _leaves_system_message_out(tokenizer, messages: Messages, options: dict | None) -> bool:
    """Whether the prompt is the same with another text in its system message."""
    system, *rest = messages
    if system["role"] != "system":
        return False
    other = [{**system, "content": f"{system['content']} Be brief."}, *rest]
    texts = [prompt_text(tokenizer, asked, options) for asked in (messages, other)]
    return texts[0] == texts[1]


def _missing_header(tokenizer, messages: Messages, text: str, options: dict | None) -> str:
    """What the template prints between a prompt and the assistant's text, but not in the prompt.

    "" for a template with a generation prompt, and for one whose answers need no beginning.
    """
    try:
        if prompt_text(tokenizer, messages, options, generation_prompt=False) != text:
            return ""
        answered = [*messages, {"role": "assistant", "content": ANSWER}]
        whole = prompt_text(tokenizer, answered, options, generation_prompt=False)
    except Exception:  # a template for prompts alone
        return ""
    before, found, _ = whole.rpartition(ANSWER)
    header = before.removeprefix(text) if found and before.startswith(text) else ""
    return header if header.strip() else ""


def _about_thoughts(tokenizer, messages: Messages, options: dict | None, thoughts: str) -> str:
    """The sentence on a template that opens a block of thoughts, with what to set."""
    tag = THOUGHT_TAG.match(thoughts)[0]
    remedy = f"set {TEMPLATE_KEY} to a copy of the template with <reasoning> in place of that {tag}"
    for flag in _possible_flags(tokenizer, options):
        changed = {**(options or {}), **flag}
        if _works(tokenizer, messages, changed) and not opened_thoughts(
            tokenizer, messages, changed
        ):
            remedy = f"set {OPTIONS_KEY} to {_as_yaml(flag)}"
            break
    return (
        f"{TEMPLATE_KEY}: the template opens {tag} in the prompt, so completions begin inside it"
        f" and never contain it; for rewards that look for <reasoning>, {remedy}"
    )


def _possible_flags(tokenizer, options: dict | None) -> Iterator[dict[str, bool]]:
    """One option each that the template reads and that is not set yet, false and then true."""
    for name in sorted((_flags(tokenizer) or set()) - (options or {}).keys()):
        yield {name: False}
        yield {name: True}


def _flags(tokenizer) -> set[str] | None:
    """The names that the chat template reads and that the caller may give; None if unknown."""
    from jinja2 import TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # transformers' own tag marks the assistant's tokens
    source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", tokenizer.get_chat_template())
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        names = meta.find_undeclared_variables(environment.parse(source))
    except TemplateError:
        return None
    given = GIVEN_TO_TEMPLATES | environment.globals.keys() | tokenizer.special_tokens_map.keys()
    return {name for name in names - given if not name.endswith("_token")}


def _as_yaml(flag: dict[str, bool]) -> str:
    return "{" + ", ".join(f"{name}: {str(value).lower()}" for name, value in flag.items()) + "}"


# ---- checks for a recipe, and of token ids


def check_recipe(tokenizer, recipe: Recipe, *, backend: str, strict: bool = True) -> None:
    """`check_template` and `check_embedding` with the system message and options of a recipe."""
    section, options = recipe.dataset, recipe.training.chat_template_kwargs
    check_template(
        tokenizer, section.system_instruction, section.system_role, options, strict=strict
    )
    check_embedding(tokenizer, recipe.model, backend)


def check_embedding(tokenizer, section: ModelSection, backend: str) -> None:
    """Raises RecipeError if the model's embedding lacks ids that every prompt may have.

    These are ids of ordinary tokens, of the padding and of the end. A warning counts the others.
    Unsloth chooses another padding token where it is beyond the embedding.
    """
    size = embedding_rows(section)
    if not (beyond := _beyond(tokenizer, size)):
        return
    always = {tokenizer.eos_token, None if backend == "unsloth" else tokenizer.pad_token}
    needed = [token for token in beyond if token in always]
    needed += beyond.keys() - tokenizer.get_added_vocab().keys()
    token = needed[0] if needed else next(iter(beyond))
    what = (
        f"the token {token!r} has the id {beyond[token]}, and the embedding of"
        f" {section.model_name!r} ends with {size - 1}"
    )
    if needed:
        raise RecipeError(
            "model.model_name",
            f"{what}; use the model's own tokenizer, or enlarge the embedding and save the model",
        )
    others = f", like {len(beyond) - 1} others" if len(beyond) > 1 else ""
    logger.warning("[GTPO] model.model_name: %s%s; no prompt may contain it", what, others)


def check_prompts(tokenizer, recipe: Recipe, *problem_sets, backend: str) -> None:
    """`check_token_ids` for the problems of a recipe; a set of problems may be None.

    Raises RecipeError as well if the template leaves system messages of the data out. Unsloth takes
    every padding id for padding, so prompts may not contain it.
    """
    unreadable = unreadable_ids(tokenizer, recipe.model)
    # unsloth_zoo 2026.10.7, pad_token.fix_pad_token: no padding token stays that ends sequences.
    if backend == "unsloth" and tokenizer.pad_token_id != tokenizer.eos_token_id:
        unreadable[tokenizer.pad_token_id] = "Unsloth takes for padding"
    for problems in problem_sets:
        if problems is None:
            continue
        options = recipe.training.chat_template_kwargs
        # With dataset.system_instruction, `check_template` has looked at this.
        own = [] if recipe.dataset.system_instruction else problems["prompt"]
        first = next((messages for messages in own if messages[0]["role"] == "system"), None)
        if first and _leaves_system_message_out(tokenizer, first, options):
            raise RecipeError(
                "dataset",
                "the chat template leaves the system messages of the rows out; set"
                f" {ROLE_KEY} to user",
            )
        check_token_ids(tokenizer, unreadable, problems["prompt"], options)


def unreadable_ids(tokenizer, section: ModelSection) -> dict[int, str]:
    """The ids that the model's embedding lacks, each with a clause that says so."""
    beyond = _beyond(tokenizer, embedding_rows(section))
    return dict.fromkeys(beyond.values(), "the model's embedding lacks")


def check_token_ids(
    tokenizer, unreadable: dict[int, str], prompts: Iterable[Messages], options: dict | None = None
) -> None:
    """Raises RecipeError if one of `prompts` has an id of `unreadable`."""
    for messages in _suspects(tokenizer, unreadable, prompts):
        for i in token_ids(tokenizer, messages, options):
            if i in unreadable:
                token, question = tokenizer.convert_ids_to_tokens(i), messages[-1]["content"]
                raise RecipeError(
                    "dataset",
                    f"the prompt {question[:80]!r} contains the token {token!r}, which"
                    f" {unreadable[i]}; {_without(tokenizer, i, messages)}",
                )


def _suspects(
    tokenizer, unreadable: dict[int, str], prompts: Iterable[Messages]
) -> Iterator[Messages]:
    """The prompts in which an unreadable token can occur: the first, and those with its text."""
    if not unreadable:
        return
    texts = tokenizer.convert_ids_to_tokens(list(unreadable))
    for row, messages in enumerate(prompts):
        said = "\n".join(message["content"] for message in messages)
        if row == 0 or any(text in said for text in texts):
            yield messages


def _without(tokenizer, i: int, messages: Messages) -> str:
    """What would help against the token `i` in the prompt of `messages`."""
    token = tokenizer.convert_ids_to_tokens(i)
    if any(token in message["content"] for message in messages):
        return "take it out of the problem"
    if i == tokenizer.pad_token_id:
        return (
            "the chat template prints it, so set another pad_token in tokenizer_config.json, or"
            " model.backend to transformers"
        )
    return f"set {TEMPLATE_KEY} to a template without it"


def _beyond(tokenizer, size: int) -> dict[str, int]:
    """The tokens whose ids are not below `size`, in the order of their ids."""
    beyond = [(i, token) for token, i in tokenizer.get_vocab().items() if i >= size]
    return {token: i for i, token in sorted(beyond)}


def embedding_rows(section: ModelSection) -> int:
    """The number of ids that the model reads, by its configuration."""
    config = read_config(section.model_name, trust_remote_code=section.trust_remote_code)
    return config.get_text_config().vocab_size


# ---- the prompt as it is read


class ReadPrompt(NamedTuple):
    """A prompt as the model reads it."""

    text: str  # its tokens as text, with special and unknown ones
    ids: list[int]
    end: str  # what the template adds after the last message


def read_prompt(tokenizer, messages: Messages, options: dict | None = None) -> ReadPrompt:
    """The prompt of `messages` as the model reads it: from its token ids back to text."""
    ids = token_ids(tokenizer, messages, options)
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return ReadPrompt(text, ids, generation_prompt(tokenizer, messages, options))


def token_ids(tokenizer, messages: Messages, options: dict[str, Any] | None = None) -> list[int]:
    """The token ids of a prompt, as TRL makes them."""
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **(options or {})
    )
