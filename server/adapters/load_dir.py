"""Adapter files below one folder of the operator's, read for callers that only name a path.

The path is a stranger's: it may climb, be a link, a pipe or a device, or change while it is read.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from reft_core.errors import AdapterNotFound, AdapterTooLarge, InvalidRequest, explain

SUFFIX = ".safetensors"


def read_below(root: Path, path: str, *, field: str, max_bytes: int) -> bytes:
    """The bytes of the adapter file at ``path``, absolute or relative to ``root``. Blocks.

    A folder means the one ``.safetensors`` file in it. Links are followed as long as they end
    below ``root``. Raises, about ``field``, :class:`InvalidRequest` for a path that leaves
    ``root`` or is no such file, :class:`AdapterNotFound` and :class:`AdapterTooLarge`.
    """
    if not path or "\0" in path:
        raise InvalidRequest.because(field, path, "a path")
    top = Path(os.path.realpath(root))
    # Decided before anything is looked at, so that an answer tells nothing of what is elsewhere.
    target = _below(top, root / path, path, field)
    try:
        if target.is_dir():
            files = sorted(target.glob(f"*{SUFFIX}"))
            if len(files) != 1:
                found = f"a folder with {len(files)}"
                raise InvalidRequest.because(field, path, f"one {SUFFIX} file, and not {found}")
            target = _below(top, files[0], path, field)
        return _read(top, target, path, field, max_bytes)
    except FileNotFoundError:
        allowed = "a file below the server's adapter_load_dir"
        raise AdapterNotFound(explain(field, path, allowed), field=field) from None
    except OSError as error:
        reason = f"a file that can be read ({error.strerror})"
        raise InvalidRequest.because(field, path, reason) from None


def _below(top: Path, target: Path, path: str, field: str) -> Path:
    """``target`` without links, or an error if it lies elsewhere than below ``top``."""
    found = Path(os.path.realpath(target))
    if not found.is_relative_to(top):
        raise InvalidRequest.because(field, path, "a path below the server's adapter_load_dir")
    return found


def _read(top: Path, target: Path, path: str, field: str, max_bytes: int) -> bytes:
    """The bytes of a regular file, reached from ``top`` without following a link.

    So whoever swaps a folder for a link after the check gains nothing.
    """
    folder = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        *folders, name = target.relative_to(top).parts or (".",)
        for part in folders:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Opening a pipe would wait for a writer.
        number = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
    with open(number, "rb") as file:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidRequest.because(field, path, "a regular file")
        data = b"" if status.st_size > max_bytes else file.read(max_bytes + 1)
        if status.st_size > max_bytes or len(data) > max_bytes:
            size = f"{path}, {status.st_size} bytes"
            raise AdapterTooLarge(explain(field, size, f"at most {max_bytes} bytes"), field=field)
        return data
