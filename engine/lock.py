"""Locks: one command at a time writes into a folder."""

import json
import os
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.distributed import print0, rank
from engine.errors import UserError, expect
from engine.files import writing

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


@contextmanager
def locked(folder: Path, holder: int = 0):
    """Inside, a rank holds folder/.lock, which names its process. UserError if another command holds it.

    The system releases the lock of a process that has died, so one that can be taken is stale. (POSIX locks, because
    loader workers do not inherit them and because they hold between machines on a shared disk.)
    """
    if rank() != holder or fcntl is None:
        yield
        return
    path, made = folder / ".lock", [each for each in (folder, *folder.parents) if not each.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b", buffering=0)
    with file:
        take(file, path)
        try:
            with writing(path):
                file.truncate(0)
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                row = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
                file.write(json.dumps(row).encode() + b"\n")
            yield
        finally:
            with suppress(OSError):
                path.unlink()
                for each in made:  # nothing is left of a command that has written nothing
                    each.rmdir()


def take(file, path: Path) -> None:
    """Lock an open file, or raise UserError that names who has it."""
    file.seek(0)
    text, owner = file.read(), "another process"
    with suppress(ValueError, KeyError, TypeError):
        owner = "process {pid} on {host} since {since}".format(**json.loads(text))
    in_use = f"{path.parent} is in use: {owner} writes into it: wait for it, stop it, or pass another --out"
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(in_use) from None
    except OSError:  # a disk without locks
        pass
    expect(os.fstat(file.fileno()).st_nlink, in_use)  # who had it has removed it just now
    if text:
        print0(f"{path.parent}: {owner} has ended without a word; its lock is taken over")


def abandoned(folder: Path) -> bool:
    """Has the process died that held this folder's lock?"""
    if fcntl is None:
        return False
    with suppress(OSError), open(folder / ".lock", "r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
