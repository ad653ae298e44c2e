"""One training at a time in an `output_dir`: a lock that the operating system releases when its process dies.

`output_dir/.training` is locked by the writing process while it trains, and says which process that is. It is removed
when the training ends. If it is there and not locked, a training was killed or failed.

The lock is `flock`: it holds among the processes of one machine, and on most network file systems among machines
(Linux NFS since 2.6.12). A file system without locks gives a warning. Windows has no `flock`: nothing is locked there.
"""

import json
import logging
import os
import socket
from datetime import datetime
from pathlib import Path

if os.name == "posix":
    import fcntl

logger = logging.getLogger(__name__)
LOCK_NAME = ".training"
#: open lock files of this process, closed in its forks: a dataloader's worker may outlive a killed training
_held: set[int] = set()


class OutputLock:
    """The lock of one trainer on its `output_dir`."""

    def __init__(self) -> None:
        #: a training in that folder was killed or failed before
        self.broke_off = False
        self._path: Path | None = None
        self._descriptor = -1

    def acquire(self, output_dir: str) -> None:
        """Takes the lock of an existing folder.

        Raises:
            ValueError: another process, or another trainer of this one, trains there.
        """
        path = Path(output_dir, LOCK_NAME)
        while True:
            left = path.exists()
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            try:
                _lock(descriptor, path)
            except BlockingIOError as error:
                os.close(descriptor)
                raise ValueError(_in_use(path)) from error
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                break
            os.close(descriptor)  # the other training ended and removed the file just now
        self._path, self._descriptor, self.broke_off = path, descriptor, left
        _held.add(descriptor)
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}).encode())

    def release(self, remove: bool) -> None:
        """Gives the lock back, if it is held. `remove`: the training did not break off, so no trace stays."""
        if self._path is None:
            return
        if remove:
            self._path.unlink(missing_ok=True)
        _held.discard(self._descriptor)
        os.close(self._descriptor)
        self._path, self._descriptor = None, -1


def _lock(descriptor: int, path: Path) -> None:
    """Locks an open file. Raises `BlockingIOError` if another process holds it."""
    if os.name != "posix":
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        logger.warning("%s cannot be locked (%s): take care that no other training writes there.", path.parent, error)


def _in_use(path: Path) -> str:
    """The message that names the other process, as far as its file says."""
    try:
        holder = json.loads(path.read_text())
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not written its name yet
        who = "another process"
    return (
        f"output_dir {str(path.parent)!r} is in use: {who}, trains there. Pass another `output_dir`, or wait for that "
        "training or end it, and then continue it with `resume_from_checkpoint=True`."
    )


def _close_in_fork() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if os.name == "posix":
    os.register_at_fork(after_in_child=_close_in_fork)
