"""Files and folders that appear whole or not at all: written aside, flushed to the disk, and then
renamed.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# in front of a name, so that its suffix still tells the format; whatever bears it may be removed
ASIDE = ".partial-"


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder at; at the end it takes the place of `path`, and vanishes
    if that fails.
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
    """A new folder to write files in; at the end each takes its place in `folder`, and all vanish
    if that fails.
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
    """Write `text` to `path`."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def move_into_place(new: Path, path: Path) -> None:
    """Rename `new`, flushed before, to `path`; what was there is gone, a folder in two steps."""
    old = path.with_name(f"{ASIDE}old-{path.name}")
    if path.is_dir():
        remove(old)
        os.rename(path, old)
    os.replace(new, path)
    flush_entries(path.parent)
    remove(old)


def flush(path: Path) -> None:
    """Let a file, or all that a folder holds, reach the disk."""
    if path.is_dir():
        for inside in path.iterdir():
            flush(inside)
        flush_entries(path)
    else:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def flush_entries(folder: Path) -> None:
    """Let the names in a folder reach the disk, where the system can do that (POSIX)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:  # file systems that cannot (some network and FUSE ones)
            pass
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there. A folder gets another name first: half of it is
    never seen under its own.
    """
    if path.is_dir() and not path.is_symlink():
        gone = Path(tempfile.mkdtemp(prefix=f"{ASIDE}gone-", dir=path.parent))
        os.rename(path, gone / path.name)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a crash has left aside in `folder`; an old folder whose successor never came gets
    its name back.
    """
    for left in folder.glob(f"{ASIDE}*"):
        name = left.name.removeprefix(f"{ASIDE}old-")
        if name != left.name and not (folder / name).exists():
            os.rename(left, folder / name)
        else:
            remove(left)
