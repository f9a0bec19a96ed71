"""Commands that `tests.faults` starts and watches, and the small trainings and evaluations that it interrupts."""

import json
import multiprocessing.util
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch
import torch._dynamo  # the optimizer imports it: once for all children

import eval as evaluation
import train
from engine.errors import run_command
from engine.stop import end_children
from tools import data as data_command
from tools import weights as weights_command

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))  # where conftest is
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
torch.set_num_threads(1)

MAINS = {"train.py": train.main, "eval.py": evaluation.main}
MAINS |= {"tools.data": data_command.main, "tools.weights": weights_command.main}
TINY = ROOT / "assets/tiny"
STEPS = 8  # of a training
PATIENCE = 90  # seconds, after which a command hangs
MODEL = ["--precision", "fp32", "--device", "cpu", "--workers", 0]

Found = list[tuple[str, str]]  # (what is wrong, as a column of the table; what was seen)


# --- a command that runs ----------------------------------------------------------------------------------------------


def run_main(words: list[str]) -> int:
    """A command line in this process -> its exit status; any other exception is printed and gives 1."""
    try:
        return run_command(lambda: MAINS[words[words[0] == "-m"]](list(map(str, words[1 + (words[0] == "-m") :]))))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def fork(function) -> int:
    """Run function() -> exit status in a child, in a session of its own -> the child's process id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        status = function()
    except BaseException:
        traceback.print_exc()
    finally:  # whatever happens, the child never returns into the code of its parent
        sys.stdout.flush()
        os._exit(status)


class Command:
    """A command in a session of its own, its output in files. A single process is forked from this one, where all is
    imported; `real` ones, and those of torchrun, are started anew."""

    def __init__(self, words: list, folder: Path, ranks: int = 1, real: bool = False, torchrun=(), file_limit: int = 0):
        self.words, self.ranks, self.status = list(map(str, words)), ranks, None
        self.out, self.err = (Path(tempfile.mkstemp(dir=folder, suffix=s)[1]) for s in (".out", ".err"))
        self.pid = fork(lambda: self.run(real, torchrun, file_limit))

    def run(self, real: bool, torchrun: tuple, file_limit: int) -> int:
        """In the child: the command, or what starts it."""
        os.chdir(ROOT)
        for number, file in ((1, self.out), (2, self.err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a shell started us with &
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # or under nohup
        if self.ranks > 1 or real:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}", *torchrun]
            os.execv(sys.executable, [sys.executable, *launch[: 99 * (self.ranks > 1)], *self.words])
        status = run_main(self.words)
        end_children()  # both end loader workers, as the interpreter does
        multiprocessing.util._exit_function()
        return status

    def printed(self) -> str:
        """All output so far."""
        return self.out.read_text(errors="replace") + self.err.read_text(errors="replace")

    def running(self) -> bool:
        """Has it not ended? Keeps its status: negative if a signal ended it."""
        if self.status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if ended else None
        return self.status is None

    def wait(self, seconds: float = PATIENCE) -> bool:
        """Does it end in time? If not, it is killed."""
        until = time.time() + seconds
        while self.running() and time.time() < until:
            time.sleep(0.005)
        in_time = not self.running()
        self.kill()
        return in_time

    def family(self) -> list[int]:
        """It and all its descendants."""
        parents, found = {}, [self.pid]
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                name, fields = stat.read_text().rsplit(")", 1)
                parents[int(name.split()[0])] = int(fields.split()[1])
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def rank_pids(self) -> list[int]:
        """The processes of torchrun's ranks."""
        return [pid for pid in self.family()[1 : 1 + self.ranks]]

    def kill(self) -> None:
        """SIGKILL to all of its processes, if it still runs."""
        for pid in self.family() if self.running() else ():
            send(pid, signal.SIGKILL)
        while self.running():
            time.sleep(0.005)

    def reaches(self, moment: str, run: Path, rng: random.Random) -> bool:
        """Wait for a moment of `MOMENTS`; False if the command ends before."""
        pattern, seconds = MOMENTS[moment]
        until = time.time() + PATIENCE
        while time.time() < until and self.running():
            if any(run.glob(pattern)) if pattern.startswith(".") else re.search(pattern, self.printed()):
                time.sleep(rng.random() * seconds)
                return self.running()
            time.sleep(0.002)
        return False

    def faults(self, statuses: tuple[int, ...], when: str = "") -> Found:
        """What is wrong with how it ended."""
        printed, wrong = self.printed(), self.status not in statuses
        found = [("traceback", trace)] if (trace := own_traceback(printed)) else []
        if wrong and self.status < 0:
            found.append(("crash", f"ended by {signal.Signals(-self.status).name} [{last_line(printed)}]"))
        elif wrong:
            found.append(
                ("status", f"{self.status}, expected {' or '.join(map(str, statuses))} [{last_line(printed)}]")
            )
        return [(what, when + seen) for what, seen in found]


def send(pid: int, number: int, group: bool = False) -> None:
    """A signal to a process, or to its group, if it is still there."""
    with suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(pid, number)


def last_line(text: str) -> str:
    """Its last line that is not empty, shortened."""
    return next((line[:200] for line in reversed(text.splitlines()) if line.strip()), "")


def own_traceback(text: str) -> str:
    """The last line of the first traceback that is not torchrun's own, which it prints for every failed rank."""
    for block in text.split("Traceback (most recent call last)")[1:]:
        if "torch/distributed/run.py" not in block and "torch/distributed/elastic" not in block:
            lines = [line for line in block.splitlines()[1:] if line.strip() and not re.match(r"(\[\w+\]:)?\s", line)]
            return lines[0][:200] if lines else block[:200]
    return next((sign for sign in ("Fatal Python error", "terminate called", "Exception ignored") if sign in text), "")


def leftovers(folder: Path) -> list[str]:
    """Half-written files."""
    return [str(path) for path in folder.rglob("*") if re.search(r"\.(partial|part|tmp)\b", path.name)]


# --- training runs ----------------------------------------------------------------------------------------------------

MOMENTS = {  # what is printed, or a file that appears in the run; then a random time of at most so many seconds
    "start": (r"", 1.2),
    "loading": (r"recipe|resuming", 0.4),
    "caching": (r"caching the", 0.5),
    "step": (rf"step +[1-7]/{STEPS} ", 0.1),
    "write": (".step-*.partial", 0.02),
    "validation": (rf"step +4/{STEPS} ", 0.4),
    "late step": (rf"step +[5-8]/{STEPS} ", 0.1),
    "evaluation": (r"evaluating on", 0.3),
    "first step": (r"step +1/", 0.1),
    "eval.py": (r"on cpu, fp32", 2.0),
}


def training(work: Path, run: Path, cached: bool = False, **flags) -> list:
    """The command line of a small training."""
    known = dict(data=work / ("many.json" if cached else "photos.json"), val_data=work / "few.json", steps=STEPS)
    known |= dict(batch=4, warmup=2, queries=2, embed_dim=64, image_size=64, eval_every=4, log_every=1, save_every=1)
    known |= dict(test_images=8, precision="fp32", device="cpu", workers=0, out=run) | flags
    listed = [part for name, value in known.items() for part in (f"--{name.replace('_', '-')}", value)]
    return ["train.py", *listed, "--cache-features" if cached else "--no-cache-features"]


def captioning(work: Path, out: Path, workers: int = 0, data: str = "many.json") -> list:
    """The command line of an evaluation; the output is the last word."""
    words = ["eval.py", "captions", "--checkpoint", TINY / "blip2", "--data", work / data]
    return [*words, "--beams", 1, *MODEL, "--workers", workers, "--out", out]


def short_training(work: Path, run: Path) -> list:
    """One of three steps, which any folder can continue."""
    return training(work, run, steps=3, keep=5, vit=TINY / "vit", bert=TINY / "bert")


def newest(run: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(folder.name[5:]) for folder in run.glob("step-??????")), default=0)


def steps_printed(text: str) -> int:
    """The last step of which a line was printed."""
    return max(map(int, re.findall(r"^step +(\d+)/", text, re.MULTILINE)), default=0)


def losses(run: Path) -> dict:
    """Step -> its losses, of log.jsonl."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {row["step"]: [row[name] for name in ("itc", "itm", "itg", "norm")] for row in rows if "itm" in row}


def unequal(run: Path, reference: Path) -> Found:
    """How a finished run differs from the one that nothing interrupted."""
    found = []
    for name in ("model.safetensors", "best/model.safetensors"):
        if not (run / name).exists() or (run / name).read_bytes() != (reference / name).read_bytes():
            found.append(("unequal", f"{name} differs from that of an uninterrupted run"))
    if losses(run) != losses(reference):
        found.append(("unequal", "log.jsonl has other losses than that of an uninterrupted run"))
    result, expected = (json.loads((folder / "retrieval.json").read_text()) for folder in (run, reference))
    found += [("unequal", "retrieval.json differs")] * (result["itc"] != expected["itc"])
    return found + [("left over", path) for path in leftovers(run)]


def resuming(words: list, run: Path, auto: bool = False) -> list:
    """The same command line for the next try."""
    return [*words, *(["--resume", "auto"] if auto else ["--resume"] * bool(newest(run)))]


def finish(words: list, run: Path, folder: Path, reference: Path, ranks: int = 1) -> Found:
    """Run to the end, and compare."""
    command = Command(words, folder, ranks)
    if not command.wait():
        return [("hang", f"resumed: no end in {PATIENCE} s [{last_line(command.printed())}]")]
    return command.faults((0,), "resumed: ") or unequal(run, reference)
