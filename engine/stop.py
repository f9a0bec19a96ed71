"""Signals that ask a command to stop: SIGTERM, Ctrl-C, a lost terminal, SIGUSR1 of a batch system.

A command ends at once, with `Stopped`; a training ends after its step. Several signals are one request: batch systems
and torchrun send them twice. Only a second Ctrl-C that a person types, more than a second later, does not wait for the
step; and nothing interrupts what is `uninterrupted`, a write. The exit status is 128 + the signal's number: 130 after
Ctrl-C, 143 after SIGTERM.
"""

import atexit
import multiprocessing.util  # before `end_children` is registered, which has to run before its own end
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

REQUESTS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
ANSWER = b"\nstopping after this step, with a checkpoint\n"


class Stopped(BaseException):
    """A signal has asked the command to stop; args: its number."""


# asked: number of the first signal; at: when; patient: is it only noted, for the loop to see; writing: inside
# `uninterrupted`; pressed: has a person insisted; for messages advice(), how to go on, and place, where the command is.
_fresh = dict(asked=0, at=0.0, patient=False, writing=False, pressed=False, advice=str, place="")
state = SimpleNamespace(**_fresh)


def request(number: int, frame=None) -> None:
    """The signal handler; `print0` calls it too, for a reader that has gone."""
    first, now = not state.asked, time.monotonic()
    typed = number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()
    state.pressed |= not first and typed and now - state.at > 1
    if first:
        state.asked, state.at = int(number), now
        if state.patient and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):
                os.write(2, ANSWER)  # print is not safe in a signal handler
    if not state.writing and (state.pressed or first and not state.patient):
        raise Stopped(state.asked)


@contextmanager
def signals():
    """Inside, signals are requests to stop; those that the caller ignores (nohup) stay ignored."""
    vars(state).update(_fresh)
    heard = [number for number in REQUESTS if signal.getsignal(number) not in (signal.SIG_IGN, request)]
    before = {number: signal.signal(number, request) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def be_patient() -> None:
    """From here on a signal is only noted in `state.asked`, until `signals` ends."""
    state.patient = True


@contextmanager
def at_once():
    """Inside, a signal does not wait, nor does one that came before."""
    patient, state.patient = state.patient, False
    try:
        if state.asked:
            raise Stopped(state.asked)
        yield
    finally:
        state.patient = patient


@contextmanager
def uninterrupted():
    """Inside, nothing stops this process; what was asked meanwhile happens at the end."""
    outer, state.writing, asked = state.writing, True, state.asked
    try:
        yield
    finally:
        state.writing = outer
    if not outer and (state.pressed or not state.patient and state.asked != asked):
        raise Stopped(state.asked)


@contextmanager
def unheard():
    """Processes that are started inside leave signals to this one, which stops them when it stops."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@atexit.register
def end_children() -> None:
    """End what was started `unheard`: Python asks daemons by a signal, and would wait for ever."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
