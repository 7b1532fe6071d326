"""Merge an adapter into its 16-bit base model, and keep the result only if it computes the same.

The merged model is written to a hidden folder beside its place and loaded again from there. Its
logits are compared with those of base model and adapter. Only then does the folder get its name.
"""

import contextlib
import gc
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gtpo.errors import RecipeError
from gtpo.hooks.turn_ends import given_ends, turn_ends
from gtpo.models import adapters, base_model, fidelity
from gtpo.models.prompt import prompt_text
from gtpo.models.saved import Saved, check_vocabulary, use_turn_ends
from gtpo.models.tokenizer import tokenizer_source
from gtpo.system.whole_files import flush, flush_entries

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32")
TEXTS, TOKENS = 8, 512  # how many texts are compared, and at most how many tokens of each
QUESTIONS = (
    "What is 12 + 30?",
    "A train leaves at nine and arrives at noon. How long does it take?",
    "Solve x + 4 = 11 for x.",
    "Name three prime numbers.",
    "Write one sentence about the sea.",
    "How many days are in two weeks?",
)


class Placement(NamedTuple):
    """Where and how precisely the models are merged and compared."""

    dtype: str  # float32 if it fits into the memory, else that of the merged model
    device: str


def export(
    saved: Saved,
    out: Path,
    *,
    dtype: str = "bfloat16",
    write_card: Callable[[Path, fidelity.Fidelity], None] | None = None,
) -> fidelity.Fidelity:
    """Write the merged model of `saved` to the folder `out`; returns how faithful it is.

    `write_card` writes a model card into the folder before the folder gets its name. Raises
    RecipeError, and leaves nothing at `out`, if the merged model differs by more than rounding to
    `dtype`.
    """
    from transformers import AutoTokenizer

    check_free(out)
    if saved.adapter is None:
        raise RecipeError(
            saved.base,
            "it is a base model, with nothing to merge; give a run, a checkpoint or an adapter",
        )
    placement = choose_placement(saved, out, dtype)
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_source(saved.base, saved.adapter),
        trust_remote_code=saved.section.trust_remote_code,
    )
    check_vocabulary(tokenizer, saved.section, saved.adapter)
    use_turn_ends(saved, tokenizer, saved.section, None)
    texts, description = sample_texts(saved, tokenizer)
    logger.info("[GTPO] Comparing on %s, in %s on %s", description, *placement)
    expected = fidelity.reference_logits(
        load_with_adapter(saved, placement), texts, _torch_dtype(dtype)
    )
    model = merge_adapter(load_with_adapter(saved, placement))
    if placement.dtype == "float32":
        _refuse(out, fidelity.defect_before_rounding(expected, model, texts))
    with _beside(out) as folder:
        save_model(model, folder, dtype, turn_ends(tokenizer))
        tokenizer.save_pretrained(folder)
        del model
        merged = _load_base(str(folder), placement, saved)
        comparison = fidelity.compare(expected, merged, texts)
        _refuse(out, comparison.defect(dtype))
        if write_card:
            write_card(folder, comparison)
        if saved.run_dir:  # so that evaluate_model.py uses the prompts of the training
            shutil.copy(saved.run_dir / "recipe.yaml", folder)
    return comparison


def _refuse(out: Path, defect: str | None) -> None:
    if defect:
        raise RecipeError(out, f"{defect}; nothing was kept")


# ---- the machine


def check_free(out: Path) -> None:
    """Raises RecipeError if `out` exists, or if nothing can be written there."""
    if os.path.lexists(out):
        raise RecipeError(
            out,
            "it exists already and is not overwritten; give another folder for the merged model",
        )
    parent = _existing_parent(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RecipeError(
            out, f"{parent} cannot be written to; give another folder for the merged model"
        )


def choose_placement(saved: Saved, out: Path, dtype: str) -> Placement:
    """The most precise placement for which the memory suffices; a GPU comes before the CPU.

    Raises RecipeError if the memory suffices for none, if the disk is too small for the merged
    model, and if the base model is quantised.
    """
    import psutil
    import torch

    trusted = saved.section.trust_remote_code
    config = base_model.read_config(saved.base, trust_remote_code=trusted)
    if getattr(config, "quantization_config", None) is not None:
        raise RecipeError(
            saved.base,
            "this base model is quantised, and the adapter is merged into 16-bit weights; name the "
            "model it was made from with --model-name",
        )
    parameters = base_model.count_parameters(config, trust_remote_code=trusted)
    merged_bytes = parameters * _torch_dtype(dtype).itemsize
    free_disk = shutil.disk_usage(_existing_parent(out)).free
    if merged_bytes > free_disk:
        raise RecipeError(
            out,
            f"the merged model takes {merged_bytes / 2**30:.1f} GiB and the disk has"
            f" {free_disk / 2**30:.1f} GiB free; give a folder on another one",
        )
    free_memory = {"cuda": torch.cuda.mem_get_info()[0]} if torch.cuda.is_available() else {}
    free_memory["cpu"] = psutil.virtual_memory().available
    for computing in dict.fromkeys(("float32", dtype)):
        for device, free in free_memory.items():
            if parameters * _torch_dtype(computing).itemsize < 0.8 * free:
                return Placement(computing, device)
    raise RecipeError(
        saved.base,
        f"{parameters / 1e9:.1f} billion parameters in {dtype} need "
        f"{merged_bytes / 0.8 / 2**30:.0f} GiB, and this machine has "
        f"{max(free_memory.values()) / 2**30:.0f} GiB free; export on a larger one",
    )


def _existing_parent(out: Path) -> Path:
    return next(parent for parent in out.absolute().parents if parent.exists())


# ---- models


def load_with_adapter(saved: Saved, placement: Placement):
    """Base model and adapter as a PeftModel."""
    return adapters.attach(_load_base(saved.base, placement, saved), saved.adapter, saved.base)


def merge_adapter(model):
    """The base model of the PeftModel `model`, with the adapter added to its weights.

    Raises RecipeError if a weight is not a finite number.
    """
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise RecipeError(f"the adapter cannot be merged ({str(error).splitlines()[0]})") from error


def save_model(model, folder: Path, dtype: str, ends: tuple[int, ...]) -> None:
    """Save the model in `dtype` as safetensors, with its generation configuration.

    That names `ends`, the ids that end a turn, so that others generate up to them too.
    """
    generation = model.generation_config
    if generation is not None and set(given_ends(generation.to_dict())) != set(ends):
        generation.eos_token_id = list(ends)
    # transformers 5.17.0 refuses to save settings of sampling where nothing is sampled.
    if generation is not None and not generation.do_sample:
        generation.update(temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
    try:
        model.to(_torch_dtype(dtype)).save_pretrained(folder)
    except (OSError, ValueError) as error:
        raise RecipeError(
            folder.parent, f"the merged model cannot be saved ({' '.join(str(error).split())})"
        ) from error


def _load_base(name: str, placement: Placement, saved: Saved):
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    gc.collect()  # an earlier PeftModel holds its memory until then
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            dtype=_torch_dtype(placement.dtype),
            use_safetensors=True,
            device_map={"": placement.device},
            trust_remote_code=saved.section.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise RecipeError(
            name, f"it cannot be loaded ({str(error).strip().splitlines()[0]})"
        ) from error


def _torch_dtype(name: str):
    import torch

    return getattr(torch, name)


@contextlib.contextmanager
def _beside(out: Path):
    """A folder beside `out`. It gets the name `out` at the end, or is removed after an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield folder
        check_free(out)  # another process may have been faster
        folder.chmod(0o755)
        flush(folder)
        folder.rename(out)
        flush_entries(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- texts to compare on


def sample_texts(saved: Saved, tokenizer) -> tuple[list, str]:
    """Token ids of some texts, each (1, T), and a description of the texts.

    They are completions that the run has recorded, or a few fixed questions if there are none.
    """
    rows = []
    for name in ("evaluation/after.jsonl", "completions.jsonl"):
        rows = rows or _records(saved.run_dir / name if saved.run_dir else None)
    description = f"{len(rows)} of the run's completions"
    if not rows:
        description = f"{len(QUESTIONS)} fixed texts"
        prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
        rows = [{"prompt": prompt, "completion": ""} for prompt in prompts]
    options = saved.recipe.training.chat_template_kwargs if saved.recipe else None
    texts = [_rendered(row["prompt"], tokenizer, options) + row["completion"] for row in rows]
    ids = [
        tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :TOKENS]
        for text in texts
    ]
    return ids, description


def _records(file: Path | None) -> list[dict]:
    """The first rows of a file that have a completion, each with another prompt.

    Headers and lines that were cut off are left out.
    """
    rows = {}
    if file is not None and file.is_file():
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if _is_record(row):
                        rows.setdefault(str(row["prompt"]), row)
                if len(rows) == TEXTS:
                    break
    return list(rows.values())


def _is_record(row) -> bool:
    return isinstance(row, dict) and isinstance(row.get("completion"), str) and row.get("prompt")


def _rendered(prompt: str | list[dict], tokenizer, options: dict | None) -> str:
    """The prompt after the chat template; without it where there is none that takes the prompt.

    Any text will do to compare logits.
    """
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template is not None:
        with contextlib.suppress(Exception):  # a template is a program, and may raise anything
            return prompt_text(tokenizer, prompt, options)
    return "\n".join(message["content"] for message in prompt)
