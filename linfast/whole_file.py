"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

__all__ = ["written_whole"]


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[str]:
    """The name of a file to write, which takes the place of ``path`` where nothing was raised.

    The mode is that of the file that it replaces, or of any new file (0666 less the umask). A link stays; the file
    that it points to is replaced.

    Raises:
        FileNotFoundError: the folder that it is to be in does not exist.
        OSError: ``path`` is a folder, a device or the like.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file that could be replaced")
    kept = path.stat().st_mode & 0o777 if path.exists() else None
    partial = path.parent / f"{path.name[:100]}.{secrets.token_hex(8)}.partial"
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if kept is None else 0o600))
    try:
        mode = partial.stat().st_mode & 0o777 if kept is None else kept
        yield str(partial)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        partial.chmod(mode)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk's names no file
        raise
