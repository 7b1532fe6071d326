"""A tokenizer that can chat and train: it has a chat template, an end token and padding."""

import logging
from pathlib import Path

from gtpo.errors import RecipeError
from gtpo.models.base_model import loading_error
from gtpo.recipe.sections import ModelSection

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
        raise RecipeError(
            "model.model_name",
            f"the tokenizer of {section.model_name!r} has no end-of-sequence token, so no "
            "completion could end; set one in its tokenizer_config.json",
        )
    # unsloth 2026.10.7 takes every padding id for padding. If padding and end were one token,
    # nothing would teach the policy to stop.
    shares_end = tokenizer.pad_token_id == tokenizer.eos_token_id
    if tokenizer.pad_token_id is None or (backend == "unsloth" and shares_end):
        vocabulary = tokenizer.get_vocab()
        spare = [token for token in SPARE_PADS if token in vocabulary]
        pad = next((t for t in spare if t != tokenizer.eos_token), tokenizer.eos_token)
        logger.warning("[GTPO] The tokenizer has no padding token of its own; %r is used", pad)
        tokenizer.pad_token = pad
    tokenizer.padding_side = "left"
    return tokenizer


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
