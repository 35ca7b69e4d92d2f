"""Writes files atomically: whole or not at all."""

import contextlib
import os
import pathlib
import tempfile


def write_whole(path, *parts):
    """Writes a file atomically.

    If the process is killed, `path` has its old or its new content, whole.

    Args:
        path: String or path.
        *parts: `bytes`, written one after the other.

    Raises:
        OSError: If the folder does not exist or cannot be written, or the
            disk is full. A file that was at `path` is unchanged.
    """
    write_together({path: parts})


def write_together(files):
    """Writes files that belong together; none if one cannot be written.

    The bytes are flushed to temporary files in the same folders. When all are
    on the disk, each is renamed.

    Args:
        files: Dict from string or path to a list of `bytes`.

    Raises:
        OSError: As in `write_whole`.
    """
    temporaries = {}
    try:
        for path, parts in files.items():
            path = pathlib.Path(path)
            handle, name = tempfile.mkstemp(
                prefix=f".{path.name}.", suffix=".part", dir=path.parent
            )
            temporaries[path] = name
            with os.fdopen(handle, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
        # Only the owner may read temporary files; these get the usual mode.
        mask = os.umask(0)
        os.umask(mask)
        for path, name in temporaries.items():
            os.chmod(name, 0o666 & ~mask)
            os.replace(name, path)
    except BaseException as error:
        for name in temporaries.values():
            with contextlib.suppress(OSError):
                os.unlink(name)
        if isinstance(error, OSError):
            raise type(error)(
                error.errno,
                f"'{path}' could not be written: {error.strerror}. A file "
                "that was there before is unchanged",
            ) from error
        raise
