"""Files in and out: text and JSON as users write them, and outputs that appear whole or not at all."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from engine.errors import UserError, expect, shorten
from engine.progress import progress

# --- read -------------------------------------------------------------------------------------------------------------

MAX_CONFIG, MAX_TEXT = 100 << 20, 4 << 30  # bytes: of a configuration, or a line; of a text that is read whole


def expect_file(path: str | Path, kind: str, most: int, missing: str = "check the path") -> None:
    """Refuse what cannot be read, is no regular file (a pipe may block), has more than `most` bytes, or is the pointer
    that Git leaves in the place of a large file until `git lfs pull`. missing: what to do if it is not there."""
    name = shorten(path)
    try:
        status = os.stat(path)
        other = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        expect(stat.S_ISREG(status.st_mode), f"{name} is {other}, expected {kind}")
        with open(path, "rb") as file:
            pointer = file.read(23) == b"version https://git-lfs"
    except FileNotFoundError:
        raise UserError(f"{name} does not exist: {missing}") from None
    except (OSError, ValueError) as error:  # ValueError: of a name with NUL or half a character in it
        raise UserError(f"{name} cannot be read ({getattr(error, 'strerror', error)}): expected {kind}") from None
    expect(not pointer, f"{name} is a pointer of Git LFS, not the file itself: run git lfs pull in its folder")
    size = f"{name} has {status.st_size:,} bytes, expected at most {most:,} of {kind}"
    expect(status.st_size <= most, f"{size}: check that it is the right file")


@contextmanager
def reading(path: str | Path, most: int):
    """Report a text file that cannot be read as a UserError."""
    expect_file(path, "a text file", most)
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): expected an unpacked text file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): expected a text file") from None


def read_text(path: str | Path, most: int = MAX_TEXT) -> str:
    """A UTF-8 text file, without a byte order mark."""
    with reading(path, most):
        return Path(path).read_text(encoding="utf-8-sig")


def parse_json(text: str):
    """The value of a JSON text. Raises ValueError, also for one too deep to be walked from any place of the program."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit - 300)
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        deep = isinstance(error, RecursionError)
        raise ValueError("too many brackets inside one another" if deep else "a number of too many digits") from None
    finally:
        sys.setrecursionlimit(limit)


def read_json(path: str | Path, most: int = MAX_TEXT):
    """The content of a JSON file."""
    text = read_text(path, most)
    try:
        return parse_json(text)
    except ValueError as error:
        how = "write or fetch it again, or name it .jsonl if it has one record a line"
        raise UserError(f"{path} is not valid JSON ({error}): {how}") from None


def read_json_lines(path: str | Path):
    """Yield the values of a JSON lines file."""
    with reading(path, sys.maxsize), open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_CONFIG), ""), start=1):
            at = f"{path}: line {number}"
            expect(len(line) < MAX_CONFIG, f"{at} has over {MAX_CONFIG:,} characters: expected one record a line")
            try:
                if line.strip():
                    yield parse_json(line)
            except ValueError as error:
                why = getattr(error, "msg", error)
                raise UserError(f"{at} is not JSON ({why}): expected one record a line") from None


def sha256(paths: list[Path]) -> str:
    """One hash of the contents of the files; identifies what they hold."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            blocks = iter(partial(file.read, 1 << 20), b"")
            for block in progress(blocks, f"hashing {path}", 1 + (path.stat().st_size >> 20)):
                digest.update(block)
    return digest.hexdigest()


# --- write -----------------------------------------------------------------------------------------------------------

# What safetensors, tokenizers and torch.save say in the place of an OSError.
NOT_WRITTEN = r"\(os error (\d+)\)|inline_container|PytorchStreamWriter|iostream error"


@contextmanager
def writing(path: str | Path, needs: int = 0):
    """Report that `path` cannot be written as a UserError. needs: bytes, if known."""
    try:
        yield
    except Exception as error:
        found = re.search(NOT_WRITTEN, str(error))
        if not isinstance(error, OSError) and not found:
            raise
        number = error.errno if isinstance(error, OSError) else int(found[1] or errno.ENOSPC)
        full = number in (errno.ENOSPC, errno.EDQUOT)
        room = f", {megabytes(needs)} are needed" * bool(needs) + f", {megabytes(free_bytes(path))} are free" * full
        how = "make room there" if full else "pass another path"
        reason = os.strerror(number) if number else error
        shown = re.sub(r"/\.([^/]+)\.partial(/|$)", r"/\1\2", shorten(path))  # what `whole` is writing
        raise UserError(f"{shown} cannot be written ({reason}{room}): {how}") from None


@contextmanager
def whole(path: str | Path, needs: int = 0):
    """Yield the path of a new file, or folder, beside `path`, which in the end becomes `path`: nothing under that name
    is ever half written, and nothing is left of what failed. UserError if it cannot be written."""
    path = Path(path)
    if is_special(path):
        with writing(path):
            yield path
        return
    path = path.resolve()  # a link stays one
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path, needs):
            remove(partial)
            yield partial
            sync(partial)
            os.replace(partial, path)
            sync(path.parent, deep=False)
    except BaseException:
        with suppress(OSError):
            remove(partial)
        raise


def is_special(path: Path) -> bool:
    """A device or a pipe, such as /dev/stdout."""
    with suppress(OSError):
        return path.exists() and not path.is_file() and not path.is_dir()
    return False


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path, deep: bool = True) -> None:
    """Wait until a file, or a folder and the files in it, are on the disk, so that a power cut does not lose them. They
    get the permissions of a new file: safetensors lets only the owner read."""
    os.umask(mask := os.umask(0))
    for each in [*(path.rglob("*") if deep and path.is_dir() else ()), path]:
        if each.is_file():
            each.chmod(0o666 & ~mask)
        with suppress(OSError):  # some disks cannot, for folders
            descriptor = os.open(each, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def write_json(path: Path, content, indent: int | None = None) -> None:
    """Write a JSON file, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=indent) + "\n")


def free_bytes(path: str | Path) -> int:
    """Free room on the disk of a file or folder that may not exist yet."""
    for folder in (Path(path), *Path(path).absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0


def megabytes(count: int) -> str:
    """ "35.1 MB"."""
    return f"{count / 1e6:,.1f} MB"


def check_room(path: str | Path, needs: int, what: str) -> None:
    """Refuse to begin what will not fit on the disk."""
    free = free_bytes(path)
    room = f"{what} needs {megabytes(needs)} in {path}, {megabytes(free)} are free"
    expect(needs <= free, f"{room}: make room there, or pass another folder")


def check_output(flag: str, path: str | Path | None) -> None:
    """Refuse an output file that is a folder, or in whose folder no file can be written."""
    if path is not None:
        path = Path(path)
        with writing(f"--{flag} {path}"):
            expect(not path.is_dir(), f"--{flag} {path} is a folder: pass the name of a file in it")
            expect(path.parent.is_dir(), f"--{flag} {path}: the folder {path.parent} does not exist, create it first")
            path.exists()  # a name may be too long
            if not is_special(path):
                with tempfile.TemporaryFile(dir=path.parent) as file:
                    file.write(b" ")
