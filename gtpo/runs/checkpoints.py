"""A run's checkpoints on disk: which are whole, which is the last one, and which may be removed.

A checkpoint is written in a folder aside. The last file in it is a manifest with the size and the
digest of every other file. Only then does the folder get its name. So a crash leaves no incomplete
checkpoint, and damage that happens later is detected.
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
    """A whole checkpoint and its manifest.

    The manifest holds `step`, `max_steps`, `recipe`, `processes`, `within_rollout`, `completions`
    (bytes of completions.jsonl) and `files` (name -> size and digest).
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of optimizer steps that the run had taken."""
        return self.manifest["step"]


def publish(written: Path, folder: Path, **manifest: Any) -> None:
    """Writes the manifest of the checkpoint at `written`, and renames it to `folder`."""
    files = {
        str(file.relative_to(written)): [file.stat().st_size, _digest(file)]
        for file in sorted(written.rglob("*"))
        if file.is_file()
    }
    flush(written)  # all files that the manifest lists, before the manifest exists
    text = json.dumps({**manifest, "files": files}, indent=1) + "\n"
    (written / MANIFEST).write_text(text, encoding="utf-8")
    flush(written)
    move_into_place(written, folder)


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`; raises RecipeError if a file is missing or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        step, files = int(manifest["step"]), dict(manifest["files"])
    except FileNotFoundError:
        if not folder.is_dir():
            raise RecipeError(
                folder, "there is no such folder; give a checkpoint, or a run directory"
            ) from None
        raise RecipeError(
            folder, f"it has no {MANIFEST}, so it is incomplete, or another program wrote it"
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
    return Checkpoint(folder, {**manifest, "step": step})


def last_whole(run_dir: Path) -> Checkpoint | None:
    """The last checkpoint of a run that is whole; None if the run has no checkpoint.

    Logs a warning for each damaged checkpoint after it. Raises RecipeError if all are damaged.
    """
    errors = []
    for folder in reversed(checkpoint_folders(run_dir)):
        try:
            checkpoint = read(folder)
        except RecipeError as error:
            errors.append(error)
            continue
        for error in errors:
            logger.warning("[GTPO] Skipped, damaged: %s", error)
        return checkpoint
    if errors:
        sentence = errors[0].mistakes[0].sentence
        raise RecipeError(
            errors[0].key,
            f"{sentence}; no checkpoint of this run is whole: start again with --overwrite",
        )
    return None


def rotate(run_dir: Path, limit: int | None, best: int | None) -> None:
    """Removes the oldest checkpoints beyond `limit`, but not the last and not that of step `best`.

    None for `limit` removes nothing.
    """
    folders = checkpoint_folders(run_dir)
    removable = [folder for folder in folders[:-1] if checkpoint_step(folder) != best]
    surplus = max(len(folders) - limit, 0) if limit else 0
    for folder in removable[:surplus]:
        remove(folder)


def best_step(run_dir: Path, history: list[dict[str, Any]]) -> int | None:
    """The step of the checkpoint with the best held-out accuracy in `history`, the later if equal.

    None if no checkpoint was evaluated.
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
