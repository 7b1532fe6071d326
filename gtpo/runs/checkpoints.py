"""A run's checkpoints on disk: which are whole, which is the last of them, and which may go.

A checkpoint is written in a folder aside and sealed: its last file is a manifest with the size and
digest of every other. Only then does it get its name. So a crash leaves none half-written, and one
that was damaged later is found out.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gtpo.errors import RecipeError
from gtpo.models.adapters import checkpoint_folders, checkpoint_step
from gtpo.system.whole_files import flush, move_into_place, remove

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, and what its manifest tells: step, max_steps, processes, recipe,
    versions, files.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]


def publish(written: Path, folder: Path, **told: Any) -> None:
    """Seal the checkpoint that was written at `written` and let it appear as `folder`."""
    files = {
        str(file.relative_to(written)): [file.stat().st_size, _digest(file)]
        for file in sorted(written.rglob("*"))
        if file.is_file()
    }
    flush(written)  # all that the manifest vouches for, before there is one
    (written / MANIFEST).write_text(
        json.dumps({**told, "files": files}, indent=1) + "\n", encoding="utf-8"
    )
    flush(written)
    move_into_place(written, folder)


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`; raises RecipeError with what is wrong with it."""
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        step, files = int(told["step"]), dict(told["files"])
    except FileNotFoundError:
        if not folder.is_dir():
            raise RecipeError(
                folder, "there is no such folder; give a checkpoint, or a run directory"
            ) from None
        raise RecipeError(
            folder, f"it has no {MANIFEST}, so it was not written to its end, or by another program"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            folder, f"its {MANIFEST} cannot be read ({type(error).__name__})"
        ) from None
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            raise RecipeError(folder, f"{name} is missing")
        if file.stat().st_size != size:
            raise RecipeError(folder, f"{name} has {file.stat().st_size} bytes instead of {size}")
        if _digest(file) != digest:
            raise RecipeError(folder, f"the content of {name} has changed")
    return Checkpoint(folder, {**told, "step": step})


def last_whole(run_dir: Path) -> Checkpoint | None:
    """The last checkpoint that is whole; says which damaged ones it skips. None where the run has
    none at all.

    Raises RecipeError where all are damaged.
    """
    problems = []
    for folder in reversed(checkpoint_folders(run_dir)):
        try:
            checkpoint = read(folder)
        except RecipeError as error:
            problems.append(error)
            continue
        for problem in problems:
            logger.warning("[GTPO] Skipped, damaged: %s", problem)
        return checkpoint
    if problems:
        raise RecipeError(
            problems[0].key,
            f"{problems[0].mistakes[0].sentence}; no checkpoint of this run is whole: start again"
            " with --overwrite",
        )
    return None


def rotate(run_dir: Path, limit: int | None, best: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, but never the last, nor that of step `best`."""
    found = checkpoint_folders(run_dir)
    removable = [folder for folder in found[:-1] if checkpoint_step(folder) != best]
    for folder in removable[: max(len(found) - limit, 0) if limit else 0]:
        remove(folder)


def best_step(run_dir: Path, history: list[dict[str, Any]]) -> int | None:
    """The step whose checkpoint did best on the held-out problems, the later of equals; None
    without an evaluation.
    """
    steps = {checkpoint_step(folder) for folder in checkpoint_folders(run_dir)}
    scores = [
        (line["evaluation/accuracy"], line["step"])
        for line in history
        if line.get("step") in steps and line.get("evaluation/accuracy") is not None
    ]
    return max(scores)[1] if scores else None


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
