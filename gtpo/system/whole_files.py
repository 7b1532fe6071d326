"""Files and folders that appear complete or not at all.

They are written under a temporary name, flushed to the disk, and then renamed.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# The beginning of a temporary name. It is a prefix because libraries read the format from the
# suffix. Anything with such a name may be removed.
ASIDE = ".partial-"


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write a file or a folder at; it replaces `path` at the end.

    If an error is raised inside, the temporary path is removed and `path` stays as it is.
    """
    aside = path.with_name(f"{ASIDE}{os.getpid()}-{path.name}")
    remove(aside)
    try:
        yield aside
        flush(aside)
        move_into_place(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(aside)
        raise


@contextlib.contextmanager
def files_written_aside(folder: Path) -> Iterator[Path]:
    """Yields a new folder to write files in; at the end each file moves into `folder`.

    If an error is raised inside, all those files are removed.
    """
    aside = folder / f"{ASIDE}files"
    remove(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
        flush(aside)
        for file in sorted(aside.iterdir()):
            move_into_place(file, folder / file.name)
    finally:
        remove(aside)


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`, complete or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def move_into_place(new: Path, path: Path) -> None:
    """Rename `new`, which is flushed already, to `path`.

    An old file is replaced in one step. An old folder takes two: it is renamed, then removed.
    """
    old = path.with_name(f"{ASIDE}old-{path.name}")
    if path.is_dir():
        remove(old)
        os.rename(path, old)
    os.replace(new, path)
    flush_entries(path.parent)
    remove(old)


def flush(path: Path) -> None:
    """Write a file, or everything in a folder, from the system's buffers to the disk."""
    if path.is_dir():
        for inside in path.iterdir():
            flush(inside)
        flush_entries(path)
    else:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def flush_entries(folder: Path) -> None:
    """Write the names in a folder to the disk, where the system can do that (POSIX)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:  # some network and FUSE file systems cannot do it
            pass
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists.

    A folder is renamed first, so that no half-removed folder is ever seen under its own name.
    """
    if path.is_dir() and not path.is_symlink():
        gone = Path(tempfile.mkdtemp(prefix=f"{ASIDE}gone-", dir=path.parent))
        os.rename(path, gone / path.name)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a crash has left in `folder`.

    If a crash came between the two steps of `move_into_place`, the old folder gets its name back.
    """
    for left in folder.glob(f"{ASIDE}*"):
        name = left.name.removeprefix(f"{ASIDE}old-")
        if name != left.name and not (folder / name).exists():
            os.rename(left, folder / name)
        else:
            remove(left)
