"""Files that are written all or nothing, and by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lamp3d.errors import DiskFullError

FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))
"""What the system says of a disk without room; libraries hand it on in errors of their own."""


def cache_root() -> Path:
    """Where what can be made again is kept: ``$LAMP3D_CACHE``, by default ``~/.cache/lamp3d``."""
    return Path(os.environ.get("LAMP3D_CACHE") or Path.home() / ".cache" / "lamp3d")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a temporary file in the same folder, flush it to disk, and rename it to ``path``.

    Raises:
        DiskFullError: there is no room for it.
    """
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        temporary.touch(exist_ok=False)  # for whom the user's umask says: scans are not everybody's
        mode = temporary.stat().st_mode
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(mode)  # a library may have made another file in its place
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def remove_leftovers(*paths: Path) -> None:
    """Remove what processes that were killed have left of writing these files; for those who alone write them."""
    for path in paths:
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
            leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, all or nothing."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """What is written within goes to a path, which is named where the disk is full.

    Raises:
        DiskFullError: it is.
    """
    try:
        yield
    except DiskFullError:  # of a file within
        raise
    except Exception as error:
        if said := [text for text in FULL if text in str(error)]:
            raise DiskFullError(f"{path} could not be written: {said[0]}. Make room for it.") from error
        raise


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone has a lock file, which the system gives back even if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
