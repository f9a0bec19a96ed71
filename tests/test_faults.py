"""A few of the faults of `tests.faults`; `python -m tests.faults` tries thousands."""

import subprocess
import sys

from conftest import ROOT


def test_a_few_kills_signals_full_disks_and_malformed_inputs_do_no_harm():
    """In a process of its own, because it forks. The same every time but for the moment at which a signal arrives."""
    counts = ["--kills", "5", "--signals", "4", "--disks", "6", "--inputs", "100"]
    command = [sys.executable, "-m", "tests.faults", "--seed", "2", "--only", "kills,signals,disks,inputs", *counts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
