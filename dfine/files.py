"""Folders and files that are written."""

import os
import socket
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
