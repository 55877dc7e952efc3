"""A folder belongs to one process at a time."""

import fcntl
import os
from pathlib import Path

from jaxllm.errors import CheckpointError, ResourceError

NAME = ".lock"


class Lock:
    """The file `.lock` in a local folder, held until `release` or the end of the process. `advice` ends its errors."""

    def __init__(self, folder: Path, advice: str):
        self.folder, self.advice = folder, advice
        self._file = None

    def take(self) -> None:
        """Does nothing when it is held already.

        Raises CheckpointError where another process has it, ResourceError where nothing can be written.
        """
        if self._file is not None:
            return
        try:
            file = (self.folder / NAME).open("a+")
        except OSError as error:
            raise unwritable(self.folder, error, self.advice) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise CheckpointError(
                f"{self.folder} is in use by another run (process {owner}); wait for it, or {self.advice}"
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def unwritable(folder: Path, error: OSError, advice: str) -> ResourceError:
    return ResourceError(f"{folder} cannot be written ({error.strerror or error}); {advice}")
