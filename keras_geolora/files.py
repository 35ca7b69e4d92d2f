"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib
import tempfile


def write_whole(path, *parts):
    """Writes a file so that nobody ever sees half of it.

    The bytes go to a file of another name in the same folder, to the disk,
    and then in one step to their place. Killed at any moment, what was at
    `path` before is whole.

    Args:
        path: String or path.
        *parts: `bytes`, written one after the other.

    Raises:
        OSError: If the folder does not exist or cannot be written, or the
            disk is full. A file that was at `path` is unchanged.
    """
    path = pathlib.Path(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=".part", dir=path.parent
        )
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        # Temporary files are for their owner alone; this one is like others.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise type(error)(
                error.errno,
                f"'{path}' could not be written: {error.strerror}. A file "
                "that was there before is unchanged",
            ) from error
        raise
