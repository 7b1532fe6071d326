"""The tokenizer alone, with what chatting and training need: a chat template, an end, and padding
of its own.
"""

import logging
from pathlib import Path

from gtpo.errors import RecipeError
from gtpo.models.base_model import loading_error
from gtpo.recipe.sections import ModelSection

logger = logging.getLogger(__name__)

SPARE_PADS = (
    "<|finetune_right_pad_id|>",
    "<|endoftext|>",
    "<|vision_pad|>",
    "<pad>",
    "[PAD]",
    "<unk>",
)


def load_tokenizer(section: ModelSection, backend: str):
    """The tokenizer alone, with a chat template and a padding token; raises RecipeError if it
    cannot chat.
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
    """Give `tokenizer` what training needs: chat template, padding token, padding on the left."""
    if section.chat_template:
        path = Path(section.chat_template)
        is_file = len(section.chat_template) < 1000 and path.is_file()
        if not is_file and "{" not in section.chat_template:
            raise RecipeError(
                "model.chat_template",
                f"there is no file {section.chat_template!r}, and it is no Jinja template",
            )
        tokenizer.chat_template = (
            path.read_text(encoding="utf-8") if is_file else section.chat_template
        )
    if not tokenizer.chat_template:
        raise RecipeError(
            "model.model_name",
            f"{section.model_name!r} has no chat template (it is a base model); set "
            "model.chat_template to a Jinja template or file, or use the model's Instruct version",
        )
    _try_template(tokenizer)
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            "model.model_name",
            f"the tokenizer of {section.model_name!r} has no end-of-sequence token, so no "
            "completion could end; set one in its tokenizer_config.json",
        )
    # Unsloth takes every pad id for padding: with pad = end of sequence, nothing would teach the
    # policy to stop.
    if tokenizer.pad_token_id is None or (
        backend == "unsloth" and tokenizer.pad_token_id == tokenizer.eos_token_id
    ):
        vocabulary = tokenizer.get_vocab()
        spare = next(
            (t for t in SPARE_PADS if t in vocabulary and t != tokenizer.eos_token),
            tokenizer.eos_token,
        )
        logger.warning("[GTPO] The tokenizer has no padding token of its own; %r is used", spare)
        tokenizer.pad_token = spare
    tokenizer.padding_side = "left"
    return tokenizer


def _try_template(tokenizer) -> None:
    """Raises RecipeError for a chat template that fails, or leaves out what the user says."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "2+2=?"}], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise RecipeError(
            "model.chat_template", f"it is no Jinja template that works ({error})"
        ) from error
    if "2+2=?" not in text:
        raise RecipeError(
            "model.chat_template",
            "it leaves out what the user says; it must print each message's content",
        )
