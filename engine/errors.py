"""User errors as sentences, and command lines."""

import argparse
import difflib
import os
import re
import signal
import subprocess
import sys
import traceback
from contextlib import suppress

from engine.distributed import LAUNCHER, RESTARTS, first_to_fail, flights, leave_processes, rank, world_size
from engine.stop import REQUESTS, Stopped, be_patient, end_children, signals, state


class UserError(Exception):
    """An error the user can fix. Its one sentence says what was got, what was expected, what to type."""


def expect(condition: object, sentence: str) -> None:
    """Raise UserError(sentence) unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def run_command(main) -> int:
    """Run a command line -> its exit status: 0; 2 after a UserError, whose sentence is printed; 128 + its number after
    a signal (see stop.py); 1 after any other error, whose traceback is printed. Of several ranks only the first that
    fails says so."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a caption or file name that the terminal cannot show is no error
            stream.reconfigure(errors="backslashreplace")
    with signals():
        status, last = 0, None
        try:
            main()
        except UserError as error:
            status, last = 2, sentence_of(error)
        except Stopped as stop:
            status, last = 128 + stop.args[0], f"stopped{': ' * bool(state.advice())}{state.advice()}"
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 141
        except SystemExit as stop:
            status = int(stop.code or 0)
        except Exception as error:
            named = isinstance(error, OSError) and error.filename is not None  # a name that is too long, a lost disk
            status, last = (2, sentence_of(error)) if named else (1, error)
        be_patient()
        if last is not None and first_to_fail():
            with suppress(OSError):  # of a terminal that has gone
                tell(unexpected(last) if isinstance(last, Exception) else last)
        several = world_size() > 1
        if status == 0:
            leave_processes()
        if several:
            leave(status)
        return status


def leave(status: int) -> None:
    """End a rank, whatever the others do: at the end of the interpreter gloo's threads may hang or abort it."""
    end_children()
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def sentence_of(error: Exception) -> str:
    """The sentence of a user's error, on one line but for lists, without words longer than a screen, with advice."""
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    text = text.rpartition("UserError: ")[2].strip()  # a loader worker wraps it in its own traceback
    text = re.sub("[\x0b\x0c\r\x85\u2028\u2029]", " ", text)
    text = re.sub(r"\S{600,}", lambda word: shorten(word[0]), text)
    return f"error: {text}" + f" ({state.advice()})" * bool(state.advice())


def unexpected(error: Exception) -> str:
    """The last line after an error that is no user's; of one of the program also the traceback is printed."""
    at = f"rank {rank()}{state.place and ', ' + state.place}"
    if world_size() > 1 and re.search("gloo|NCCL|c10d|TCPStore", str(error)):
        reason = re.sub(r"^\[\S*\]\s*", "", str(error).splitlines()[0]).split(". ")[0][:120]
        print(f"{at}: {reason}", file=sys.stderr, flush=True)  # torchrun may take half a minute to end the others
        lost = "error: a process was killed, or did not answer within --timeout minutes"
        return f"{lost}{'; ' * bool(state.advice())}{state.advice()}{flights()}"
    traceback.print_exception(error)
    return f"error: {at}: {type(error).__name__}, a fault of the program: please report it with the lines above"


# Run with torchrun's pid and a sentence: print it when torchrun has ended.
LAST_WORDS = """
import os, select, sys
try:
    select.select([os.pidfd_open(int(sys.argv[1]))], [], [], 40)
except OSError:
    pass
print(sys.argv[2], file=sys.stderr)
"""


def tell(sentence: str) -> None:
    """Print the last sentence of a command that failed; under torchrun after torchrun's own report, which is long."""
    ends = RESTARTS >= int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if "TORCHELASTIC_RUN_ID" in os.environ and ends and os.getppid() == LAUNCHER != 1 and hasattr(os, "pidfd_open"):
        for number in REQUESTS:  # it is to outlive what has stopped this process
            signal.signal(number, signal.SIG_IGN)
        words = [str(LAUNCHER), sentence.replace("\0", "")]
        subprocess.Popen([sys.executable, "-ISc", LAST_WORDS, *words], start_new_session=True)
    else:
        clear = "\r\033[K" * sys.stderr.isatty()  # a line of `progress`
        print(f"{clear}{sentence}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations, whose errors are one sentence that names the nearest flag."""

    def __init__(self, **settings):
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter} | settings)

    def error(self, message):
        """As `run_command` prints it."""
        unknown = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
        near = [hit for word in unknown for hit in difflib.get_close_matches(word, self._option_string_actions, n=1)]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"{message}{hint} ({self.prog} --help lists all flags)")


def shorten(value, most: int = 500) -> str:
    """A name or a value as messages show it."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most // 2]}... ({len(text):,} letters)"


def at_least_1(text: str, most: int = 1_000_000) -> int:
    """An argparse type."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    if int(text) > most:
        raise argparse.ArgumentTypeError(f"got {text}, expected at most {most:,}")
    return int(text)
