"""Merge an adapter into its 16-bit base model, and keep the result only if it computes what the two
compute.

The merged model is written beside its place, loaded again from there and compared; only then it
gets its name.
"""

import contextlib
import gc
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from gtpo.errors import RecipeError
from gtpo.models import adapters, base_model, fidelity
from gtpo.models.saved import Saved, check_vocabulary
from gtpo.report import model_card
from gtpo.system.whole_files import flush, flush_entries

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32")
TEXTS, TOKENS = 8, 512  # how many texts are compared, and at most how much of each
QUESTIONS = (
    "What is 12 + 30?",
    "A train leaves at nine and arrives at noon. How long does it take?",
    "Solve x + 4 = 11 for x.",
    "Name three prime numbers.",
    "Write one sentence about the sea.",
    "How many days are in two weeks?",
)


class Plan(NamedTuple):
    """How an export is done on this machine."""

    # in which the models are added up and compared: float32 where there is room for it, else that
    # of the result
    computing: str
    device: str


def check_free(out: Path) -> None:
    """Raises RecipeError if something is at `out`, or nothing can be written there."""
    if os.path.lexists(out):
        raise RecipeError(
            out,
            "it exists already and is not overwritten; give another folder for the merged model",
        )
    parent = _existing(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RecipeError(
            out, f"{parent} cannot be written to; give another folder for the merged model"
        )


def export(saved: Saved, out: Path, *, dtype: str = "bfloat16") -> fidelity.Fidelity:
    """Write the merged model of `saved` to the folder `out`, and return how far it is from base
    model and adapter.

    Raises RecipeError, and leaves nothing at `out`, where it is not the same model within rounding
    to `dtype`.
    """
    from transformers import AutoTokenizer

    check_free(out)
    if saved.adapter is None:
        raise RecipeError(
            saved.base,
            "it is a base model, with nothing to merge; give a run, a checkpoint or an adapter",
        )
    plan = make_plan(saved, out, dtype)
    own = (saved.adapter / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(
        saved.adapter if own else saved.base, trust_remote_code=saved.section.trust_remote_code
    )
    check_vocabulary(saved, saved.section, tokenizer)
    texts, whence = sample_texts(saved, tokenizer)
    logger.info("[GTPO] Comparing on %s, in %s on %s", whence, plan.computing, plan.device)
    expected = fidelity.reference(load(saved, plan.computing, plan.device), texts, _dtype(dtype))
    model = merged(load(saved, plan.computing, plan.device))
    problem = fidelity.sum_problem(expected, model, texts) if plan.computing == "float32" else None
    if problem:
        raise RecipeError(out, f"{problem}; nothing was kept")
    with _beside(out) as folder:
        save(model, folder, dtype)
        tokenizer.save_pretrained(folder)
        del model
        found = fidelity.compare(
            expected, _load_base(str(folder), plan.computing, plan.device, saved), texts
        )
        if problem := found.problem(dtype):
            raise RecipeError(out, f"{problem}; nothing was kept")
        model_card.write(folder, model_card.merged_card(saved, dtype, str(found)))
        if saved.run_dir:  # so that evaluate_model.py asks it what training asked
            shutil.copy(saved.run_dir / "recipe.yaml", folder)
    return found


def make_plan(saved: Saved, out: Path, dtype: str) -> Plan:
    """Where there is room for what, by the size of the base model; raises RecipeError where there
    is none, on the disk too.
    """
    import psutil
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            saved.base, trust_remote_code=saved.section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RecipeError(
            saved.base, f"its config.json cannot be used ({str(error).splitlines()[0]})"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise RecipeError(
            saved.base,
            "this base model is quantised, and the adapter is merged into 16-bit weights; name the "
            "model it was made from with --model-name",
        )
    parameters = base_model.parameters(config, trust_remote_code=saved.section.trust_remote_code)
    needed, free = parameters * _dtype(dtype).itemsize, shutil.disk_usage(_existing(out)).free
    if needed > free:
        raise RecipeError(
            out,
            f"the merged model takes {needed / 2**30:.1f} GiB and the disk has {free / 2**30:.1f}"
            " GiB free; give a folder on another one",
        )
    rooms = {"cuda": torch.cuda.mem_get_info()[0]} if torch.cuda.is_available() else {}
    rooms["cpu"] = psutil.virtual_memory().available
    for computing in dict.fromkeys(("float32", dtype)):
        for device, room in rooms.items():
            if parameters * _dtype(computing).itemsize < 0.8 * room:
                return Plan(computing, device)
    raise RecipeError(
        saved.base,
        f"{parameters / 1e9:.1f} billion parameters in {dtype} need "
        f"{parameters * _dtype(dtype).itemsize / 0.8 / 2**30:.0f} GiB, and this machine has "
        f"{max(rooms.values()) / 2**30:.0f} GiB free; export on a larger one",
    )


def load(saved: Saved, dtype: str, device: str):
    """Base model and adapter as a PeftModel."""
    return adapters.attach(_load_base(saved.base, dtype, device, saved), saved.adapter, saved.base)


def merged(model):
    """The base model with the adapter added to its weights; raises RecipeError for weights that are
    no numbers.
    """
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise RecipeError(
            "adapter", f"it cannot be merged ({str(error).splitlines()[0]})"
        ) from error


def save(model, folder: Path, dtype: str) -> None:
    """The model in `dtype` as safetensors, with its configuration for generation."""
    generation = model.generation_config
    # transformers 5.17.0 saves none with settings that have no use
    if generation is not None and not generation.do_sample:
        generation.update(temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
    try:
        model.to(_dtype(dtype)).save_pretrained(folder)
    except (OSError, ValueError) as error:
        raise RecipeError(
            folder.parent, f"the merged model cannot be saved ({' '.join(str(error).split())})"
        ) from error


def sample_texts(saved: Saved, tokenizer) -> tuple[list, str]:
    """Token ids of some texts, each (1, T), and what they are: completions of the run's records,
    else fixed questions.
    """
    rows = []
    for name in ("evaluation/after.jsonl", "completions.jsonl"):
        rows = rows or _records(saved.run_dir / name if saved.run_dir else None)
    whence = f"{len(rows)} of the run's completions" if rows else f"{len(QUESTIONS)} fixed texts"
    rows = rows or [
        {"prompt": [{"role": "user", "content": question}], "completion": ""}
        for question in QUESTIONS
    ]
    texts = [_rendered(row["prompt"], tokenizer) + row["completion"] for row in rows]
    return [
        tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :TOKENS]
        for text in texts
    ], whence


@contextlib.contextmanager
def _beside(out: Path):
    """A folder beside `out` that takes its name when all went well, and is removed when not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield folder
        check_free(out)  # somebody may have been faster
        folder.chmod(0o755)
        flush(folder)
        folder.rename(out)
        flush_entries(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _load_base(name: str, dtype: str, device: str, saved: Saved):
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    gc.collect()  # a PeftModel that went before holds its memory until then
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            dtype=_dtype(dtype),
            use_safetensors=True,
            device_map={"": device},
            trust_remote_code=saved.section.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise RecipeError(
            name, f"it cannot be loaded ({str(error).strip().splitlines()[0]})"
        ) from error


def _records(file: Path | None) -> list[dict]:
    """A file's first rows with a prompt and a completion, each of another prompt; headers and cut
    lines are left out.
    """
    rows = {}
    if file is not None and file.is_file():
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if (
                        isinstance(row, dict)
                        and isinstance(row.get("completion"), str)
                        and row.get("prompt")
                    ):
                        rows.setdefault(str(row["prompt"]), row)
                if len(rows) == TEXTS:
                    break
    return list(rows.values())


def _rendered(prompt: str | list[dict], tokenizer) -> str:
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template is None:
        return "\n".join(message["content"] for message in prompt)
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)


def _dtype(name: str):
    import torch

    return getattr(torch, name)


def _existing(out: Path) -> Path:
    return next(p for p in out.absolute().parents if p.exists())
