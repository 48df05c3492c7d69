"""Folders that have their name only while they are whole: linked, put into place and removed by renames."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

# What a folder is called while it is being made or removed: nobody looks for such names.
MADE, REMOVED = ".partial", ".removed"
EXCHANGE, HERE = 2, -100  # of renameat2(2): RENAME_EXCHANGE, AT_FDCWD


def link_folder(source: Path, target: Path) -> None:
    """Make `target` of hard links to the files of `source`, of copies where the disk has none, by one rename.

    Files that are then removed or replaced in `source` stay as they are in `target`. FileNotFoundError, and nothing
    left, where `source` goes meanwhile.
    """
    made = target.with_name(target.name + MADE)
    shutil.rmtree(made, ignore_errors=True)
    try:
        shutil.copytree(source, made, copy_function=_link)
        os.rename(made, target)
    except shutil.Error as error:  # copytree's collection of what went wrong, file by file
        shutil.rmtree(made, ignore_errors=True)
        if source.is_dir():
            raise OSError(f"{source} cannot be linked or copied to {target}: {error.args[0][0][-1]}") from error
        raise FileNotFoundError(f"{source} went while it was being linked.") from error
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # of another disk, or one without links
        shutil.copy2(source, target)


def remove_folder(folder: Path) -> None:
    """Remove a folder, which loses its name before it loses a file."""
    gone = folder.with_name(folder.name + REMOVED)
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(folder, gone)
    shutil.rmtree(gone)


def replace_folder(new: Path, folder: Path) -> None:
    """Give the folder `new` the name `folder`, and remove what had it; a reader finds the one or the other, whole."""
    if folder.exists() and _exchanged(new, folder):
        remove_folder(new)
        return
    if folder.exists():  # a moment without either, where the system cannot exchange two names
        remove_folder(folder)
    os.rename(new, folder)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names at once; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0
