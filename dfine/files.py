"""Writing: a folder at a time, tried before the work, and whole or not at all."""

import contextlib
import os
import socket
import tempfile
import time
import warnings
from pathlib import Path
from typing import TextIO

from dfine.config import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def lock(folder: Path, option: str) -> TextIO:
    """Locks a folder for one process, while the file that it returns is open, and at most for this process's life.

    The file stays; the lock does not, so a killed run leaves nothing to clean up. It is POSIX's, which belongs to one
    process: a `flock` would pass to forked loader workers and outlive the run with them. It holds between machines if
    their file system passes locks on, as NFS does, and is lost if this process opens the file again and closes it.

    Args:
        option: where the user named the folder, for messages.
    Raises:
        ConfigError: another process has it; names that process.
    """
    file = (folder / "lock").open("a+")
    try:
        if fcntl is None:
            raise OSError(0, "there are no POSIX locks on this system")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise ConfigError(
            f"{option}: {folder} is in use by {file.read().strip() or 'another process'}: wait for its end, stop it, "
            f"or name another {option}"
        ) from error
    except OSError as error:
        message = f"{option}: {folder} cannot be locked ({error.strerror}): see to it that nothing else writes there"
        warnings.warn(message, stacklevel=2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file


def try_writing(folder: Path, option: str) -> None:
    """Makes a folder and writes a file that is gone at once: what stands in the way shows before the work, not after.

    Args:
        option: where the user named the folder, for messages.
    Raises:
        ConfigError: the folder cannot be made or written to, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))
    except OSError as error:
        raise ConfigError(
            f"{option}: cannot write to {folder} ({error.strerror}): see to it, or name another {option}"
        ) from error


def write_whole(texts: dict[Path, str]) -> None:
    """Writes files beside their places and moves them there when all are written: they are whole or as they were.

    Raises:
        ConfigError: the disk is full or not writable.
    """
    besides = {path: path.with_name(f"{path.name}.writing") for path in texts}
    try:
        for path, beside in besides.items():
            with beside.open("w", encoding="utf-8") as file:
                file.write(texts[path])
                file.flush()
                os.fsync(file.fileno())
        for path, beside in besides.items():
            beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            for beside in besides.values():
                beside.unlink(missing_ok=True)
        raise ConfigError(
            f"cannot write {', '.join(map(str, texts))} ({error.strerror}); nothing is changed"
        ) from error
