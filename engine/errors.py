"""User errors as sentences: command lines, and the text files that users write."""

import argparse
import difflib
import json
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from engine.distributed import leave_processes, rank


class UserError(Exception):
    """An error the user can fix. Its one sentence says what was got, what was expected, what to type."""


def expect(condition: object, sentence: str) -> None:
    """Raise UserError(sentence) unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def run_command(main) -> int:
    """Run a command line and return its exit status: without a traceback, a UserError becomes its sentence and status
    2, Ctrl-C the sentence of its KeyboardInterrupt, if any, and 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a caption or file name that the terminal cannot show is no error
            stream.reconfigure(errors="backslashreplace")
    clear = "\r\033[K" * sys.stderr.isatty()  # a line of `progress`
    try:
        main()
    except UserError as error:
        sentence = str(error).rpartition("UserError: ")[2].strip()  # a loader worker wraps it in its own traceback
        print(f"{clear}error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if rank() == 0:
            print(f"{clear}{str(stop) or 'stopped'}", file=sys.stderr, flush=True)
        return 130
    leave_processes()
    return 0


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations, whose errors are one sentence that names the nearest flag."""

    def __init__(self, **settings):
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter} | settings)

    def error(self, message):
        unknown = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
        near = [hit for word in unknown for hit in difflib.get_close_matches(word, self._option_string_actions, n=1)]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        self.exit(2, f"error: {message}{hint} ({self.prog} --help lists all flags)\n")


def at_least_1(text: str) -> int:
    """An argparse type."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    return int(text)


def expect_fetched(path: str | Path) -> None:
    """Refuse the pointer that Git leaves in the place of a large file until `git lfs pull`."""
    if Path(path).is_file():  # a pipe can be read only once
        with open(path, "rb") as file:
            pointer = file.read(23) == b"version https://git-lfs"
        expect(not pointer, f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull in its folder")


@contextmanager
def reading(path: Path):
    """Report a text file that cannot be read as a UserError."""
    try:
        expect_fetched(path)
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): expected an unpacked text file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): expected a text file") from None


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, without a byte order mark."""
    with reading(path):
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path: str | Path):
    """The content of a JSON file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        how = "write or fetch it again, or name it .jsonl if it has one record a line"
        raise UserError(f"{path} is not valid JSON ({error}): {how}") from None


def read_json_lines(path: str | Path):
    """Yield the values of a JSON lines file."""
    with reading(path), open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    yield json.loads(line)
            except json.JSONDecodeError as error:
                at = f"{path}: line {number}"
                raise UserError(f"{at} is not JSON ({error.msg}): expected one record a line") from None


def check_output(flag: str, path: str | Path | None) -> None:
    """Refuse an output file that is a folder, or in whose folder no file can be written."""
    if path is not None:
        folder = Path(path).parent
        expect(not Path(path).is_dir(), f"--{flag} {path} is a folder: pass the name of a file in it")
        expect(folder.is_dir(), f"--{flag} {path}: the folder {folder} does not exist, create it first")
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"--{flag} {path} cannot be written ({error.strerror}): pass another folder") from None
