"""What a user reads while it works: a line of steps fits a terminal and is a mean, what is unusual is said once with
what helps, and whatever takes longer than two seconds shows how far it is."""

import io
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from engine import device as engine_device
from engine import progress as engine_progress
from engine import stop
from engine.device import bf16_speed, choose_precision
from engine.health import LONG, Health
from engine.log import log_line
from engine.progress import clock, progress
from losses import ITM_PRIOR

CFG = SimpleNamespace(steps=1890, batch=32, clip=1.0, warmup=90, max_text_tokens=32, negatives_ramp=600)


def row(step: int, **numbers) -> dict:
    """A row of log.jsonl, of a step where nothing is unusual."""
    usual = dict(itc=2.0, itm=0.4, itg=3.0, lr=1e-3, norm=2.0, temperature=0.07, truncated=0.0)
    return {"step": step, **usual, "images_per_s": 100.0, "waited": 0.0, "gigabytes": 1.0, **numbers}


# --- lines -----------------------------------------------------------------------------------------------------------


def test_a_line_has_the_means_since_the_last_one():
    rows = [row(19, itc=1.0, norm=10.0), row(20, itc=2.0, norm=20.0, lr=2e-4)]
    line = log_line(rows, CFG, ("itc", "itm", "itg"), 0.03)
    assert line == (
        "step   20/1890  itc 1.500 itm 0.400 itg 3.000  hard 3% temp 0.070 lr 2.0e-04 norm 15.0  100/s 9m58s"
    )
    assert "hard" not in log_line(rows, CFG, ("itc", "itm"), 1.0)  # as always from then on
    assert "temp" not in log_line([row(1, lm=4.0)], CFG, ("lm",), 1.0)


@pytest.mark.parametrize("step, steps, batch, speed", [(1, 1890, 32, 1.0), (250_000, 250_000, 1680, 8704.0)])
def test_a_line_fits_a_terminal_of_a_hundred_columns(step, steps, batch, speed):
    cfg = SimpleNamespace(**vars(CFG) | dict(steps=steps, batch=batch))
    hardness = 1.0 if steps > 10_000 else 0.03  # the paper's negatives are hard at once
    assert len(log_line([row(step, norm=99.9, images_per_s=speed)], cfg, ("itc", "itm", "itg"), hardness)) <= 100


# --- the machine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, times, precision, why",
    [
        ("avx2 avx512_bf16 amx_bf16", 2.84, "bf16", "2.8 times as fast here"),
        ("avx2 avx512_bf16", 1.64, "bf16", "1.6 times as fast here"),
        ("avx2 avx512_bf16", 0.6, "fp32", "bf16 is no faster on this CPU"),
        ("avx2 avx512_bf16", 1.1, "fp32", "bf16 is no faster on this CPU"),  # the next measurement may say 0.9
        ("avx2", None, "fp32", "bf16 is no faster on this CPU"),  # not measured
    ],
)
def test_the_precision_is_the_one_that_is_clearly_faster_on_the_cpu(
    tmp_path, monkeypatch, flags, times, precision, why
):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\nbugs : spectre")
    monkeypatch.setattr(engine_device, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(engine_device, "bf16_speed", times and (lambda: times))
    assert choose_precision(torch.device("cpu")) == (precision, why)


def test_what_is_asked_for_is_not_measured(monkeypatch):
    monkeypatch.setattr(engine_device, "cpu_precision", None)
    for wanted in ("fp32", "bf16"):
        assert choose_precision(torch.device("cpu"), wanted) == (wanted, "as requested")


def test_the_measurement_leaves_no_trace():
    """Neither in the random numbers nor in autocast, and it is made once a process."""
    torch.manual_seed(3)
    state = torch.get_rng_state()
    speed = bf16_speed()
    assert 0.01 < speed < 100 and bf16_speed() == speed
    assert (torch.get_rng_state() == state).all() and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "running, threads, environment, said",
    [(3, 2, {}, True), (2, 2, {}, False), (3, 1, {}, False), (3, 2, {"GOMP_SPINCOUNT": "1000"}, False)],
)
def test_busy_neighbours_are_told_with_what_helps(tmp_path, monkeypatch, capsys, running, threads, environment, said):
    """This process is one of those that run. Nothing is said where waiting threads already sleep."""
    (tmp_path / "loadavg").write_text(f"0.10 1.22 0.99 {running}/107 6613")
    monkeypatch.setattr(engine_device, "Path", lambda _: tmp_path / "loadavg")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    engine_device.prepare_cpu(1)
    note = "note: 2 other threads are busy on 2 cores, and PyTorch's threads wait for each other by spinning: put "
    assert capsys.readouterr().out.startswith(note + "GOMP_SPINCOUNT=1000 before the command") == said


# --- what is unusual -------------------------------------------------------------------------------------------------


def said(*rows_of_calls, hardness: float = 1.0, cfg=CFG) -> list[str]:
    """What is said in several calls."""
    health = Health(cfg, (0.001, 0.5))
    return [line for rows in rows_of_calls for line in health.unusual(rows, hardness)]


STEPS = range(500, 500 + LONG)


@pytest.mark.parametrize(
    "unusual, sentence",
    [
        (dict(temperature=0.5), "the temperature has been at its bound, 0.500, for 100 steps"),
        (dict(temperature=0.001), "the temperature has been at its bound, 0.001, for 100 steps"),
        (dict(norm=11.0), "clipped to less than a tenth in each of the last 100 steps (norm 11, --clip 1)"),
        (dict(itm=ITM_PRIOR), "ITM has predicted no more than the prior, one match in three, for 100 steps"),
        (dict(waited=0.5), "the steps wait for images 50% of their time: pass more --workers"),
    ],
)
def test_what_lasts_is_said_once_with_what_helps(unusual, sentence):
    rows = [row(step, **unusual) for step in STEPS]
    (line,) = said(rows, rows)
    assert line.startswith("  note: ") and sentence in line
    assert not said(rows[:-1])  # not long enough
    interrupted = [*rows[: LONG // 2], row(0), *rows[LONG // 2 :]]
    assert not said(interrupted) and not said([row(step) for step in STEPS])


def test_itm_at_the_prior_is_usual_in_the_first_steps():
    assert not said([row(step, itm=ITM_PRIOR) for step in range(1, 1 + LONG)])


def test_cut_texts_are_said_at_the_first_line_and_again_when_they_are_many():
    few, many, none = [row(1, truncated=0.01)], [row(2, truncated=0.06)], [row(3)]
    first, second = said(few, few, none, many, many)
    assert "1.00% of the texts reach --max-text-tokens 32 and are cut: pass a larger one if their ends" in first
    assert "6.00% of the texts reach --max-text-tokens 32 and are cut: pass a larger one, or shorten" in second
    assert len(said(many)) == 1 and not said(none)


# --- waiting ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def watched(monkeypatch):
    """Progress over five items of a second each -> what is printed."""

    def watch(stream, seconds: float = 1.0, **options) -> str:
        now = SimpleNamespace(time=0.0)
        monkeypatch.setattr(engine_progress.time, "monotonic", lambda: now.time)
        monkeypatch.setattr(sys, "stderr", stream)
        done = []
        for item in progress(range(5), "caching", **options):
            now.time += seconds
            done.append(item)
        assert done == list(range(5))
        return stream.getvalue()

    return watch


def test_on_a_terminal_one_line_is_updated_after_two_seconds_and_cleared(watched):
    shown = watched(Terminal())
    assert shown.split("\r\033[K")[1:] == [
        "caching: 40%, 3s left",
        "caching: 60%, 2s left",
        "caching: 80%, 1s left",
        "",
    ]
    assert "\n" not in shown and watched(Terminal(), seconds=0.3) == ""


def test_elsewhere_there_is_a_plain_line_now_and_then(watched):
    assert watched(io.StringIO()) == "" and "\r" not in watched(io.StringIO(), seconds=10.0)
    assert watched(io.StringIO(), seconds=10.0) == "caching: 40%, 30s left\ncaching: 80%, 10s left\n"


def test_what_has_no_length_is_counted(watched, monkeypatch):
    assert clock(7500) == "2h05m" and clock(190) == "3m10s" and clock(12) == "12s"
    shown = []
    monkeypatch.setattr(engine_progress.time, "monotonic", lambda: 10.0 * len(shown))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for item in progress(iter(range(3)), "reading"):
        shown.append(item)
    assert sys.stderr.getvalue() == "reading: 2\n"


def test_ctrl_c_is_answered_at_once(capfd):
    """Before the step has ended."""
    with stop.signals():
        stop.be_patient()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.state.asked == signal.SIGINT
    assert "stopping after this step, with a checkpoint" in capfd.readouterr().err
