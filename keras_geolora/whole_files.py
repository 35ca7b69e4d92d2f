"""Writes files atomically: whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

# How the folders begin in which new files wait.
STAGE = ".written-together-"


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
    path = pathlib.Path(path)
    name = None
    with errors_naming(path):
        try:
            handle, name = tempfile.mkstemp(
                prefix=f".{path.name}.", suffix=".part", dir=path.parent
            )
            with os.fdopen(handle, "wb") as file:
                flush(file, parts)
            # Only the owner may read temporary files; this gets the usual mode.
            os.chmod(name, 0o666 & ~umask())
            os.replace(name, path)
        except BaseException:
            if name is not None:
                with contextlib.suppress(OSError):
                    os.unlink(name)
            raise


def write_together(folder, files):
    """Writes files that belong together into a folder, atomically.

    Whoever opens them by their names finds all old or all new ones, at any
    moment and after a kill at any moment. No system can rename two files at
    once, so this does what Kubernetes does for its volumes: the names become
    links through a link `now`, which leads to the old files; that one link is
    exchanged; then the names become files again. The folder itself is never
    renamed, as it may be mounted in a container or hold other files.

    Where the last file is not there yet, or links are not supported, the last
    file is removed first and comes back last: readers that begin with it find
    all or nothing. Writers wait for each other, and remove what others left
    that were killed.

    Args:
        folder: Path of a folder that exists.
        files: Dict from name to a list of `bytes`. The last one is what readers
            open first.

    Raises:
        OSError: As in `write_whole`.
    """
    folder = pathlib.Path(folder)
    names = list(files)
    with errors_naming(folder), only_writer(folder) as alone:
        left_by_kills = set(folder.glob(f"{STAGE}*")) if alone else set()
        stage = pathlib.Path(tempfile.mkdtemp(prefix=STAGE, dir=folder))
        try:
            os.chmod(stage, 0o777 & ~umask())
            os.mkdir(stage / "new")
            for name, parts in files.items():
                with errors_naming(folder / name):
                    with open(stage / "new" / name, "wb") as file:
                        flush(file, parts)
            if (folder / names[-1]).exists() and can_link(stage):
                exchange(folder, stage, names)
            else:
                put(folder, stage, names)
        finally:
            # An interrupt may have left links, which need what they lead to.
            for path in (left_by_kills | {stage}) - stages(folder, names):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def only_writer(folder):
    """Waits until no other process or thread writes into a folder like this.

    Yields whether that is sure: Windows and some network file systems have no
    such locks.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(handle)


def put(folder, stage, names):
    """Puts the new files into a folder, see `write_together`: all or none."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(folder / names[-1])
    for name in names:
        os.replace(stage / "new" / name, folder / name)


def exchange(folder, stage, names):
    """Exchanges the files of a folder, see `write_together`: old or new."""
    os.mkdir(stage / "old")
    for name in names:
        keep(folder / name, stage / "old" / name)
    try:
        for name in names:
            link(folder / name, f"{stage.name}/now/{name}", stage)
        link(stage / "now", "new", stage)
    finally:
        now = stage / os.readlink(stage / "now")
        for name in names:
            if (now / name).exists():
                os.replace(now / name, folder / name)
            else:
                os.unlink(folder / name)


def can_link(stage):
    """Returns whether links can be made, and makes `now`, the one in between.

    Windows allows them to few users, and file systems such as FAT to none.
    """
    try:
        os.symlink("old", stage / "now", target_is_directory=True)
    except (OSError, NotImplementedError):
        return False
    return True


def link(path, target, stage):
    """Makes a path a link to a target, whatever it was before."""
    temporary = stage / "link"
    is_folder = path.parent == stage
    os.symlink(target, temporary, target_is_directory=is_folder)
    os.replace(temporary, path)


def keep(path, copy):
    """Makes a copy of a file if there is one, if possible without bytes."""
    if path.exists():
        try:
            os.link(path.resolve(), copy)
        except OSError:
            shutil.copy2(path, copy)


def stages(folder, names):
    """Returns through which folders of `write_together` names are links now.

    There is one if the writer was killed or interrupted.
    """
    found = set()
    for name in names:
        if (folder / name).is_symlink():
            first, *rest = pathlib.Path(os.readlink(folder / name)).parts
            if rest == ["now", name] and first.startswith(STAGE):
                found.add(folder / first)
    return found


def flush(file, parts):
    """Writes parts to a file and waits until they are on the disk."""
    for part in parts:
        file.write(part)
    file.flush()
    os.fsync(file.fileno())


def umask():
    """Returns which permissions the process takes from what it makes."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def errors_naming(path):
    """Has an `OSError` say which file was not written, once."""
    try:
        yield
    except OSError as error:
        text = error.strerror or str(error)
        if "could not be written" in text:
            raise
        raise type(error)(
            error.errno,
            f"'{path}' could not be written: {text}. A file that was there "
            "before is unchanged",
        ) from error
