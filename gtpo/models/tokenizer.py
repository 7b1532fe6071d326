"""A tokenizer that can chat and train: it has a chat template, the ends of a turn, and padding.

`agree_on_turn_ends` decides which ids end an assistant's turn. The ids stay with the tokenizer, in
memory and in every folder in which it is saved. All who need them call `turn_ends`.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

from gtpo.errors import RecipeError
from gtpo.hooks.turn_ends import KEY, given_ends, turn_ends
from gtpo.models.base_model import loading_error
from gtpo.recipe.sections import ModelSection, TrainingSection

logger = logging.getLogger(__name__)

# tokens that a vocabulary may have beside the end token, and that no text contains
SPARE_PADS = (
    "<|finetune_right_pad_id|>",
    "<|endoftext|>",
    "<|vision_pad|>",
    "<pad>",
    "[PAD]",
    "<unk>",
)
ANSWER = "The answer is 4711."  # of an assistant, in the conversations that show where a turn ends
# A text that looks like the end of a turn: <|im_end|>, </s>, <end_of_turn>, [/ASSISTANT]
MARKER = re.compile(r"\s*(<[|\uff5c/]?[^\s<>]+>|\[/?[A-Z_]+\])")


def tokenizer_source(base: str, adapter: Path | None) -> str:
    """The folder or hub name from which a policy's tokenizer is loaded.

    That is the adapter's folder if a tokenizer was saved there, else the base model. An adapter was
    trained with the special tokens and the chat template that are saved with it.
    """
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        return str(adapter)
    return base


def load_tokenizer(section: ModelSection, backend: str):
    """The tokenizer of `section.model_name`, prepared by `prepare_tokenizer`.

    Raises RecipeError if there is none, or if it cannot chat.
    """
    from transformers import AutoTokenizer

    if section.trust_remote_code:
        logger.warning(
            "[GTPO] model.trust_remote_code: Python code that comes with %r will be run",
            section.model_name,
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            section.model_name, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise loading_error(
            "model.model_name",
            f"no tokenizer could be loaded from {section.model_name!r}",
            section,
            error,
        ) from error
    return prepare_tokenizer(tokenizer, section, backend)


def prepare_tokenizer(tokenizer, section: ModelSection, backend: str):
    """`tokenizer` with the chat template of `section`, a padding token, and padding on the left.

    Raises RecipeError if it has no chat template, or no end token. `gtpo.models.prompt` checks the
    template.
    """
    if section.chat_template:
        tokenizer.chat_template = _given_template(section.chat_template)
    if not tokenizer.chat_template:
        raise RecipeError(
            "model.model_name",
            f"{section.model_name!r} has no chat template (it is a base model); set "
            "model.chat_template to a Jinja template or file, or use the model's Instruct version",
        )
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token_id = template_end(tokenizer).token
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            "model.model_name",
            f"the tokenizer of {section.model_name!r} has no end-of-sequence token, so no "
            "completion could end; set one in its tokenizer_config.json",
        )
    _choose_padding(tokenizer, backend)
    tokenizer.padding_side = "left"
    return tokenizer


def _choose_padding(tokenizer, backend: str) -> None:
    """Gives `tokenizer` a padding token if it has none.

    On Unsloth no end of a turn may be padding, as far as there are other tokens: a spare token is
    safer than the hook `gtpo.hooks.padding`.
    """
    ends = turn_ends(tokenizer)
    if tokenizer.pad_token_id is None or backend == "unsloth" and tokenizer.pad_token_id in ends:
        vocabulary = tokenizer.get_vocab()
        spare = [token for token in SPARE_PADS if token in vocabulary]
        pad = next((t for t in spare if vocabulary[t] not in ends), tokenizer.eos_token)
        if pad == tokenizer.pad_token:
            return
        logger.warning("[GTPO] The tokenizer has no padding token of its own; %r is used", pad)
        tokenizer.pad_token = pad


def _given_template(text_or_file: str) -> str:
    path = Path(text_or_file)
    # A template can be longer than the system allows for a path.
    if len(text_or_file) < 1000 and path.is_file():
        return path.read_text(encoding="utf-8")
    if "{" not in text_or_file:
        raise RecipeError(
            "model.chat_template",
            f"there is no file {text_or_file!r}, and it is no Jinja template",
        )
    return text_or_file


# ---- the ends of a turn


class TemplateEnd(NamedTuple):
    """What the chat template puts after an assistant's message."""

    token: int | None = None  # the id with which the message ends
    text: str | None = None  # an end that is no token of the tokenizer
    # The first token of the next turn. Some models end their turn with it.
    next_turn: int | None = None


class TurnEndRule(NamedTuple):
    """Which ids end a turn by the chat template, generation_config and the tokenizer."""

    ids: tuple[int, ...]
    doubt: str | None  # why the three do not agree, as a sentence
    text: str | None  # an end that is no token of the tokenizer


def agree_on_turn_ends(
    tokenizer,
    section: ModelSection,
    training: TrainingSection | None = None,
    *,
    backend: str | None = None,
    kept: tuple[int, ...] | None = None,
    keeper: str = "the tokenizer",
) -> None:
    """Decides which ids end a turn for `tokenizer`, keeps them with it, and logs them in one line.

    `section.model_name` is the base model, whose generation_config is read. `training` may name
    ids in its `generation_kwargs`, which come first. `kept` are ids of an earlier run, which come
    before the rule; `keeper` says in a sentence where they are from. Without `kept`, ids that were
    saved with the tokenizer count as kept.
    """
    options = training.trl_options() if training else {}
    rule = turn_end_rule(tokenizer, section, options.get("chat_template_kwargs"))
    given = _given(tokenizer, options.get("generation_kwargs"))
    kept = _known(tokenizer, tokenizer.init_kwargs.get(KEY)) if kept is None else kept
    ends = given or kept or rule.ids
    tokenizer.init_kwargs.pop(KEY, None)
    if set(ends) != {tokenizer.eos_token_id} or set(rule.ids) != set(ends):
        tokenizer.init_kwargs[KEY] = list(ends)
    _make_special(tokenizer, set(ends) & set(rule.ids))
    if backend:
        _choose_padding(tokenizer, backend)
    names = named(tokenizer, ends)
    if given:
        logger.info("[GTPO] A turn ends with %s, by training.generation_kwargs", names)
    elif kept and set(kept) != set(rule.ids):
        logger.warning(
            "[GTPO] A turn ends with %s, which %s keeps; by today's rule it would end with %s",
            names,
            keeper,
            named(tokenizer, rule.ids),
        )
    elif rule.doubt and not kept:
        logger.warning("[GTPO] A turn ends with %s, but %s", names, rule.doubt)
    else:
        logger.info("[GTPO] A turn ends with %s", names)


def _make_special(tokenizer, ids: set[int]) -> None:
    """Makes tokens special, so that they do not stand in the texts that rewards get.

    Some tokenizers have the end of a turn as an added token that is not special.
    """
    for token in ids:
        added = tokenizer.added_tokens_decoder.get(token)
        if added is not None and not added.special:
            added.special = True
            tokenizer.add_tokens([added], special_tokens=True)


def hand_over(tokenizer, other) -> None:
    """Gives `other`, the same tokenizer loaded again, the chat template and the ends of the first.

    The prompts were filtered by their length with this template.
    """
    other.chat_template = tokenizer.chat_template
    other.eos_token = tokenizer.eos_token
    other.init_kwargs.pop(KEY, None)
    if KEY in tokenizer.init_kwargs:
        other.init_kwargs[KEY] = tokenizer.init_kwargs[KEY]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    _make_special(other, special & set(turn_ends(tokenizer)))


def restore_end(tokenizer, folder: Path) -> tuple[int, ...] | None:
    """The ends of a turn that were saved in `folder`, whose end token `tokenizer` gets.

    Where none were saved, the end token alone ends a turn. None if there is no tokenizer.
    """
    try:
        saved = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    end = saved.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if end in tokenizer.get_vocab():
        tokenizer.eos_token = end
    return _known(tokenizer, saved.get(KEY)) or (tokenizer.eos_token_id,)


def turn_end_rule(
    tokenizer, section: ModelSection, template_kwargs: dict | None = None
) -> TurnEndRule:
    """Which ids end a turn: all that the three sources name, the chat template's first.

    An id of generation_config that is an ordinary token is left out: it is left over from another
    vocabulary, and would end completions anywhere. The sources agree if another one names what the
    chat template puts, and if generation_config names what another one names.
    """
    end, own = template_end(tokenizer, template_kwargs), tokenizer.eos_token_id
    configured = generation_ends(section)
    special = _special(tokenizer) | {own, end.token}
    used = [token for token in configured if token in special]
    template = end.token
    if template is None and end.text is None and end.next_turn in used:
        template = end.next_turn
    ids = tuple(dict.fromkeys(t for t in (template, *used, own) if t is not None))
    doubt = None
    if end.text:
        doubt = (
            f"the chat template ends it with {end.text!r}, which is no token of this tokenizer; use"
            " a template whose end is a token, or name ids in training.generation_kwargs:"
            " {eos_token_id: [...]}"
        )
    elif ordinary := [token for token in configured if token not in special]:
        doubt = (
            f"generation_config also names {named(tokenizer, ordinary)}, which is no special token"
            " of this tokenizer and is left out; correct the model's generation_config.json"
        )
    elif template not in (None, own, *used) or used and not {template, own} & {*used}:
        sources = {
            "the chat template": () if template is None else (template,),
            "generation_config": used,
            "the tokenizer": (own,),
        }
        says = [f"{source} names {named(tokenizer, t)}" for source, t in sources.items() if t]
        doubt = (
            f"{', '.join(says)}: any of them ends a completion, and the model may know only one;"
            " training.generation_kwargs: {eos_token_id: [...]} decides otherwise"
        )
    return TurnEndRule(ids, doubt, end.text)


def unheeded_ends(
    tokenizer, section: ModelSection, template_kwargs: dict | None = None
) -> tuple[str, ...]:
    """Texts with which a turn may end by today's rule, although they end no completion."""
    rule = turn_end_rule(tokenizer, section, template_kwargs)
    others = [token for token in rule.ids if token not in turn_ends(tokenizer)]
    texts = [*tokenizer.convert_ids_to_tokens(others), rule.text]
    return tuple(text for text in texts if text)


def template_end(tokenizer, template_kwargs: dict | None = None) -> TemplateEnd:
    """What the chat template puts after an assistant's message; all None if it cannot be found."""
    question = {"role": "user", "content": "What is 4700 + 11?"}
    answer = {"role": "assistant", "content": ANSWER}
    after = _rendered_after_answer(tokenizer, [question, answer], template_kwargs)
    before_next = _rendered_after_answer(tokenizer, [question, answer, question], template_kwargs)
    token = _first_special(tokenizer, after)
    if token is not None:
        return TemplateEnd(token)
    marker = MARKER.match(after)
    if marker:
        return TemplateEnd(text=marker[1])
    return TemplateEnd(next_turn=_first_special(tokenizer, before_next))


def generation_ends(section: ModelSection) -> tuple[int, ...]:
    """The ids that `generation_config` of the base model names; none if there is none.

    transformers 5.17.0 makes one of config.json where a model has no generation_config.json.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(section.model_name).eos_token_id
    except (OSError, ValueError):
        try:
            config = AutoConfig.from_pretrained(
                section.model_name, trust_remote_code=section.trust_remote_code
            )
        except (OSError, ValueError, ImportError):
            return ()
        ends = getattr(config.get_text_config(), "eos_token_id", None)
    return given_ends({"eos_token_id": ends})


def named(tokenizer, ids) -> str:
    """Tokens as a sentence names them: `'<|end|>' (468) or '<|endoftext|>' (476)`."""
    texts = tokenizer.convert_ids_to_tokens(list(ids))
    return " or ".join(f"{text!r} ({token})" for text, token in zip(texts, ids, strict=True))


def _given(tokenizer, generation_kwargs: Any) -> tuple[int, ...]:
    """The ids of `training.generation_kwargs` with the tokenizer's own; none if it names none.

    TRL cuts completions at the tokenizer's end token in any case. Raises RecipeError for an id that
    the tokenizer does not have.
    """
    if isinstance(generation_kwargs, str):
        generation_kwargs = json.loads(generation_kwargs)
    given = given_ends(generation_kwargs)
    for token in given:
        if token >= len(tokenizer):
            raise RecipeError(
                "training.generation_kwargs",
                f"eos_token_id {token} is no token: this tokenizer has {len(tokenizer)}, from 0 to"
                f" {len(tokenizer) - 1}",
            )
    return tuple(dict.fromkeys((*given, tokenizer.eos_token_id))) if given else ()


def _known(tokenizer, ids: Any) -> tuple[int, ...] | None:
    """`ids` from a file, if they are ids of the tokenizer's tokens; None otherwise."""
    if not isinstance(ids, list) or not ids:
        return None
    known = all(isinstance(token, int) and 0 <= token < len(tokenizer) for token in ids)
    return tuple(ids) if known else None


def _special(tokenizer) -> set[int]:
    """The ids of all tokens that stand beside the ordinary vocabulary."""
    return {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}


def _rendered_after_answer(tokenizer, messages: list[dict], template_kwargs: dict | None) -> str:
    """What stands after the assistant's message, up to the next message of the user."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **(template_kwargs or {}))
    except Exception:  # a template may raise anything; another check reports it
        return ""
    after = text.rpartition(ANSWER)[2] if ANSWER in text else ""
    return after.partition(messages[0]["content"])[0]


def _first_special(tokenizer, text: str) -> int | None:
    special = _special(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return next((token for token in ids if token in special), None)
