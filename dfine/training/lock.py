"""One run at a time in a run folder."""

import os
import socket
import time
from pathlib import Path
from typing import TextIO

from dfine.config import ConfigError
from dfine.distributed import say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def lock(folder: Path) -> TextIO:
    """Locks a folder while the file that it returns is open, and at most for this process's life.

    The file stays; the lock does not, so a killed run leaves nothing to clean up. It is POSIX's, which belongs to one
    process: a `flock` would pass to forked loader workers and outlive the run with them. It holds between machines if
    their file system passes locks on, as NFS does, and is lost if this process opens the file again and closes it.

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
            f"run_dir: {folder} is in use by {file.read().strip() or 'another process'}: wait for its end, stop it, or "
            "name another run_dir"
        ) from error
    except OSError as error:
        say(f"run_dir: {folder} cannot be locked ({error.strerror}): see to it that no other run writes there")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return file
