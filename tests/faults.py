"""Faults on purpose: kills, signals, full disks, malformed input and restarts, drawn from a seed, and a table of what
went wrong.

    python -m tests.faults --minutes 5 --seed 0
    python -m tests.faults --only kills,signals --kills 20 --signals 10

What is tried depends on the seed and the counts alone; the moment at which a kill or a signal meets the program does
not. Everything happens in a temporary folder. Exit status 1 if anything failed.
"""

import argparse
import gc
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

from engine.errors import run_command
from sources.shapes import ShapesWorld
from tests.fault_commands import (
    PATIENCE,
    ROOT,
    Command,
    Found,
    captioning,
    finish,
    fork,
    last_line,
    leftovers,
    newest,
    own_traceback,
    resuming,
    run_main,
    send,
    short_training,
    steps_printed,
    training,
    unequal,
)  # fmt: skip
from tests.fault_disks import plan_disks, try_disks
from tests.fault_inputs import INPUTS
from tests.public_checkpoints import ENCODERS, lavis_checkpoint
from vit import PRESETS

A_MINUTE = {"kills": 20, "signals": 12, "disks": 8, "inputs": 600, "restarts": 4}  # tries
WRONG = ["lost", "unequal", "traceback", "crash", "hang", "left over", "accepted", "started", "sentence", "status"]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


# --- kills ------------------------------------------------------------------------------------------------------------

CHAIN = 5  # kills of one run
KILLED = ("start", "step", "write", "validation", "late step", "write", "evaluation")


def plan_kills(count: int, seed: int) -> list[dict]:
    """Chains of kills of one run, in the order in which it comes to these moments."""
    plans = []
    while count > 0:
        name = f"kills {seed} {len(plans)}"
        rng = random.Random(name)
        kind = "torchrun" if len(plans) % 10 == 9 else rng.choice(["train", "train", "train", "cached", "eval"])
        length = min(count, 3 if kind == "torchrun" else CHAIN)
        moments = [KILLED[i] for i in sorted(rng.sample(range(len(KILLED)), length))]
        if kind == "eval":
            moments = ["eval.py"] * length
        elif kind == "cached":
            moments[0] = "caching"
        plans.append({"kind": kind, "moments": moments, "workers": rng.choice([0, 0, 1]), "auto": rng.random() < 0.5})
        plans[-1] |= {"intruder": rng.random() < 0.5, "seed": name, "tries": length}
        count -= length
    return plans


def try_kills(work: Path, folder: Path, plan: dict) -> Found:
    """Kill, resume, kill, ... and resume until the end."""
    rng, run, found = random.Random(plan["seed"]), folder / "run", []
    if plan["kind"] == "eval":
        return try_evaluation(work, folder, rng, [signal.SIGKILL] * plan["tries"], plan["workers"])
    ranks, cached = 2 if plan["kind"] == "torchrun" else 1, plan["kind"] == "cached"
    words = training(work, run, cached, workers=plan["workers"])
    for moment in plan["moments"]:
        before = newest(run)
        command = Command(resuming(words, run, plan["auto"]), folder, ranks)
        if not command.reaches(moment, run, rng):
            if not command.wait():
                return [("hang", f"before {moment}")]
            if command.status:  # refused or failed, before it was killed
                return command.faults((0,), f"before {moment}: ")
            found.append(("not reached", moment))
            continue
        if plan["intruder"] and moment == "step" and ranks == 1:
            found += intrude(command, resuming(words, run, plan["auto"]), folder)
        command.kill()
        if newest(run) < max(before, steps_printed(command.printed()) - 1):
            found.append(("lost", f"step {steps_printed(command.printed())} was printed, the newest is {newest(run)}"))
    reference = work / ("cached" if cached else "two" if ranks == 2 else "one") / "run"
    return found + finish(resuming(words, run, plan["auto"]), run, folder, reference, ranks)


def intrude(command: Command, words: list, folder: Path) -> Found:
    """A second training into the run of a live one, which stands still meanwhile."""
    for pid in command.family():
        send(pid, signal.SIGSTOP)
    other = Command(words, folder)
    if not other.wait():
        return [("hang", "a second training into a live run")]
    return other.faults((2,), "a second training into a live run: ")


def try_evaluation(work: Path, folder: Path, rng: random.Random, signals: list[int], workers: int) -> Found:
    """Interrupt an evaluation several times, each time typing the same command again -> what is wrong."""
    out, found = folder / "result.json", []
    words = captioning(work, out, workers)
    for number in signals:
        command, name = Command(words, folder), signal.Signals(number).name
        if command.reaches("eval.py", folder, rng):
            send(command.pid, number, group=number != signal.SIGKILL and rng.random() < 0.5)
            if not command.wait(30):
                return [*found, ("hang", f"goes on for 30 s after {name}")]
            if number != signal.SIGKILL:
                found += command.faults((0, 128 + number), f"at {name}: ")
        elif command.status:
            return command.faults((0,))
    command = Command(words, folder)
    if not command.wait():
        return [*found, ("hang", "typed again")]
    found += command.faults((0,), "typed again: ")
    if out.exists() and out.read_bytes() != (work / "captions/result.json").read_bytes():
        found.append(("unequal", "the result differs from that of an uninterrupted evaluation"))
    return found + [("left over", path) for path in leftovers(folder)]


# --- signals ----------------------------------------------------------------------------------------------------------


def plan_signals(count: int, seed: int) -> list[dict]:
    """Each value of each factor equally often, up to the rest, in a random combination."""
    rng = random.Random(f"signals {seed}")
    factors = {"signal": list(map(int, SIGNALS)), "times": [1, 2, 3], "to": ["process", "group"], "workers": [0, 1, 4]}
    factors["moment"] = ["loading", "step", "validation", "write", "caching", "evaluation", "eval.py", "start"]
    columns = {name: (rng.sample(values, len(values)) * count)[:count] for name, values in factors.items()}
    columns |= {"ranks": [2 if i % 6 == 5 else 1 for i in range(count)]}
    for values in columns.values():
        rng.shuffle(values)
    rows = [dict(zip(columns, row)) | {"seed": f"signals {seed} {i}"} for i, row in enumerate(zip(*columns.values()))]
    for row in rows:
        if row["ranks"] == 2:
            row["to"] = rng.choice(["process", "group", "torchrun and ranks", "torchrun and ranks"])
            if row["signal"] == signal.SIGUSR1:  # torchrun does not pass it on
                row["to"] = "torchrun and ranks"
            row["moment"] = "step" if row["moment"] in ("eval.py", "start", "caching") else row["moment"]
    return rows


def try_signals(work: Path, folder: Path, plan: dict) -> Found:
    """Stop a training or an evaluation by signals -> what is wrong with its end, and with what is left of it."""
    rng, run, number, moment = random.Random(plan["seed"]), folder / "run", plan["signal"], plan["moment"]
    if moment == "eval.py":
        return try_evaluation(work, folder, rng, [number] * plan["times"], plan["workers"])
    every = 1 if moment == "write" else 100
    words = training(work, run, moment == "caching", workers=plan["workers"], save_every=every)
    command = Command(words, folder, plan["ranks"], real=moment == "start")
    if not command.reaches(moment, run, rng):
        command.wait()
        return command.faults((0,)) or [("not reached", moment)]
    until = time.time() + 30
    members = send_all(command, plan, rng)
    if not command.wait(until - time.time()):
        return [("hang", f"runs 30 s after {signal.Signals(number).name} [{last_line(command.printed())}]")]
    while (alive := [pid for pid in members if Path(f"/proc/{pid}").exists()]) and time.time() < until + 5:
        time.sleep(0.05)  # ranks may outlive torchrun, and loader workers look for their parent every 5 s
    found = [("hang", f"{len(alive)} of its processes live on")] * bool(alive)
    until = time.time() + 2
    while plan["ranks"] == 2 and "stop" not in last_line(command.printed()) and time.time() < until:
        time.sleep(0.02)  # the last words come after torchrun has ended
    # torchrun says that it was stopped even if its ranks were faster.
    done = command.status == 0 or plan["ranks"] == 2
    printed, finished = command.printed(), done and (run / "retrieval.json").exists()
    if not finished:
        # Before our first line is run Python answers by itself.
        silent = moment == "start" and (not printed or last_line(printed) == "KeyboardInterrupt")
        if not silent:
            found += command.faults((128 + number,) if plan["ranks"] == 1 else (-number, *range(1, 256)))
        said = printed if plan["ranks"] > 1 else last_line(command.err.read_text()) + last_line(command.out.read_text())
        found += [("sentence", f"does not say that it stopped [{said[-200:]}]")] * (not silent and "stop" not in said)
    if steps_printed(printed) > newest(run):
        found.append(("lost", f"step {steps_printed(printed)} was printed, the newest checkpoint is {newest(run)}"))
    found += [("left over", path) for path in leftovers(run)]
    reference = work / ("cached" if moment == "caching" else "two" if plan["ranks"] == 2 else "one") / "run"
    if finished:
        return found + unequal(run, reference)
    return found + finish(resuming(words, run), run, folder, reference, plan["ranks"])


def send_all(command: Command, plan: dict, rng: random.Random) -> set[int]:
    """Send the signals of a plan -> all processes that the command had."""
    members = set(command.family())
    for number in range(plan["times"]):
        if number:
            time.sleep(rng.uniform(0.05, 1.0 if plan["times"] == 2 else 1.5))
        members |= set(command.family())
        for pid in command.family() if plan["to"] == "torchrun and ranks" else [command.pid]:
            send(pid, plan["signal"], group=plan["to"] == "group")
    return members


# --- inputs -----------------------------------------------------------------------------------------------------------

BATCH = 25  # inputs that one process reads


def plan_inputs(count: int, seed: int) -> list[dict]:
    """Batches of inputs; how many of each surface is fixed."""
    weights = {name: weight for name, (_, weight) in INPUTS.items()}
    surfaces = [name for name in weights for _ in range(max(1, round(count * weights[name] / sum(weights.values()))))]
    random.Random(f"inputs {seed}").shuffle(surfaces)
    inputs = [(surface, f"inputs {seed} {number}") for number, surface in enumerate(surfaces)]
    batches = [inputs[i : i + BATCH] for i in range(0, len(inputs), BATCH)]
    return [{"inputs": batch, "tries": len(batch), "seed": batch[0][1]} for batch in batches]


def try_inputs(work: Path, folder: Path, plan: dict) -> Found:
    """Read a batch of malformed inputs in a child; after one that ends it or hangs, in a new child."""
    found, done, inputs = [], 0, plan["inputs"]
    while done < len(inputs):
        journal = folder / f"journal-{done}"
        journal.touch()
        place = folder / str(done)
        pid = fork(lambda place=place, rest=inputs[done:], journal=journal: read_inputs(work, place, rest, journal))
        seen, since, ended = 0, time.time(), 0
        while not ended and time.time() - since < 20:
            time.sleep(0.02)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if (length := journal.stat().st_size) > seen:
                seen, since = length, time.time()
        if not ended:
            send(pid, signal.SIGKILL, group=True)
            os.waitpid(pid, 0)
        rows = [json.loads(line) for line in journal.read_text().splitlines()]
        found += [(what, text) for row in rows for what, text in row["found"]]
        done += sum(row["done"] for row in rows)
        if done < len(inputs):
            what = "crash" if ended else "hang"
            how = f"ends its process with {os.waitstatus_to_exitcode(status)}" if ended else "no end in 20 s"
            found.append((what, f"{how} <- {rows[-1]['input'] if rows else inputs[done]}"))
            done += 1
    return found


def read_inputs(work: Path, folder: Path, inputs: list, journal: Path) -> int:
    """In a child: write and read inputs one by one, each noted in the journal before and after."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + 6 * 2**30,) * 2)
    os.chdir(ROOT)
    folder.mkdir()
    files = [folder / name for name in ("out", "err")]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    for surface, seed in inputs:
        place = folder / seed.split()[-1]
        place.mkdir()
        os.environ["MARKER"] = str(place / "marker")
        for file in files:
            os.truncate(file, 0)
        try:
            reads, sure, how = INPUTS[surface][0](work, place, random.Random(seed))
        except Exception:  # a mistake of ours
            reads, sure, how = lambda: None, False, traceback.format_exc()[-300:].replace("\n", " | ")
        name = f"{seed} {surface}: {how}"
        with open(journal, "a") as note:
            note.write(json.dumps({"input": name, "done": 0, "found": []}) + "\n")
        status = run_main(list(map(str, reads))) if isinstance(reads, list) else run_function(reads)
        sys.stdout.flush()
        errors = files[1].read_text(errors="replace")
        found = [("harness", "")] * ("Traceback" in how or " | " in how)
        found += judge(status, sure, errors, reads if isinstance(reads, list) else ["function"])
        found += [("started", "a program")] * Path(os.environ["MARKER"]).exists()
        with open(journal, "a") as note:
            found = [(what, f"{seen} <- {name}") for what, seen in found]
            note.write(json.dumps({"input": name, "done": 1, "found": found}) + "\n")
        shutil.rmtree(place)
    return 0


def run_function(function) -> int:
    """A function in the place of a command's main."""
    try:
        return run_command(function)
    except BaseException:
        traceback.print_exc()
        return 1


def judge(status: int, sure: bool | str, errors: str, words: list) -> Found:
    """What is wrong with how an input was read. sure: should it have been refused?"""
    command = " ".join(map(str, words[:3]))
    if trace := own_traceback(errors):
        where = re.findall(r'File "' + re.escape(str(ROOT)) + r'/((?!tests)[^"]+)", line (\d+)', errors)
        last = [line for line in errors.splitlines() if line.strip() and line[0] != " "][-1][:160]
        return [("traceback", f"{last or trace} in {':'.join(where[-1]) if where else '?'}, {command}")]
    lines = errors.split("\n")  # not at U+2028
    wrong = [line for line in lines if line.strip() and not line.startswith((" ", "error: ", "skipped: "))]
    said = sum(line.startswith("error: ") for line in lines)
    if status == 2 and (said != 1 or wrong):
        return [("sentence", f"{said} error lines, others: {wrong[:2]}, {command}")]
    if status == 0 and sure is True:
        return [("accepted", command)]
    if status != 0 and sure == "no":
        return [("status", f"{status} for something right, {command}")]
    return [] if status in (0, 1, 2) else [("status", f"{status}, {command}")]


# --- restarts ---------------------------------------------------------------------------------------------------------


def plan_restarts(count: int, seed: int) -> list[dict]:
    """One long run with so many kills of a rank, and one with a rank that stops answering."""
    return [{"kills": count, "seed": f"restarts {seed}", "tries": count}, {"kills": 0, "seed": f"stopped rank {seed}"}]


def try_restarts(work: Path, folder: Path, plan: dict) -> Found:
    """Kill ranks under torchrun --max-restarts, or stop one for good."""
    rng, run, steps = random.Random(plan["seed"]), folder / "run", plan["kills"] * 2 + 8
    if not plan["kills"]:
        return try_stopped_rank(training(work, run, steps=5000, timeout=0.1), run, folder, rng)
    words = training(work, run, steps=steps, eval_every=steps)
    command = Command(words, folder, 2, torchrun=("--max-restarts", "30"))
    kills = 0
    while kills < plan["kills"] and advances(command, run):
        time.sleep(rng.random() * 0.2)
        send(rng.choice(command.rank_pids() or [command.pid]), signal.SIGKILL)
        kills += 1
        time.sleep(0.1)
    if not command.wait(PATIENCE if kills == plan["kills"] else 0):
        return [("hang", f"no progress after {kills} kills [{last_line(command.printed())}]")]
    found = [("lost", f"it ended after {kills} of {plan['kills']} kills")] * (kills < plan["kills"])
    return found + command.faults((0,)) or unequal(run, work / "restarts/run")


def advances(command: Command, run: Path) -> bool:
    """Does it write another checkpoint?"""
    before, until = newest(run), time.time() + PATIENCE
    while command.running() and newest(run) <= before and time.time() < until:
        time.sleep(0.01)
    return command.running() and newest(run) > before


def try_stopped_rank(words: list, run: Path, folder: Path, rng) -> Found:
    """SIGSTOP of a rank: the other gives up within --timeout."""
    command = Command(words, folder, 2)
    if not command.reaches("first step", run, rng):
        command.wait()
        return [("not reached", "step"), *command.faults((0,))]
    ranks = command.rank_pids()
    stopped = rng.choice(ranks)
    (other,) = set(ranks) - {stopped}
    send(stopped, signal.SIGSTOP)
    until = time.time() + 6 + 20
    while Path(f"/proc/{other}/exe").exists() and time.time() < until:
        time.sleep(0.05)
    found = [("hang", "the other rank waits on")] * Path(f"/proc/{other}/exe").exists()
    send(stopped, signal.SIGCONT) if found else None
    if not command.wait(60):
        found.append(("hang", "torchrun waits on"))
    return found + command.faults(tuple(range(1, 256)))


# --- all of it --------------------------------------------------------------------------------------------------------

PARTS = {
    "kills": (plan_kills, try_kills), "signals": (plan_signals, try_signals), "disks": (plan_disks, try_disks),
    "inputs": (plan_inputs, try_inputs), "restarts": (plan_restarts, try_restarts),
}  # fmt: skip


def prepare(work: Path) -> None:
    """The images and annotation files of the tries, and a Ghostscript that tells when it is started."""
    world = ShapesWorld("val")
    for folder, count in (("photos", 24), ("one-photo", 1)):
        (work / folder).mkdir()
        for i in range(count):
            world.image(i).save(work / folder / f"{i}.png")
    records = [{"image": f"photos/{i}.png", "caption": world.captions(i)} for i in range(24)]
    many = [record | {"image_id": 24 * n + i} for n in range(6) for i, record in enumerate(records)]
    questions = [{"image": "photos/0.png", "question": "is it red?", "answer": ["yes"], "question_id": 0}]
    for name, rows in (("photos", records), ("few", records[:8]), ("many", many), ("questions", questions)):
        (work / f"{name}.json").write_text(json.dumps(rows))
    commands = {"training": short_training(work, work), "evaluation": captioning(work, work)}
    (work / "commands.json").write_text(json.dumps(commands, default=str))
    PRESETS.update(ENCODERS)
    lavis_checkpoint(work / "lavis.pth", 1, "eva-g")
    (work / "bin").mkdir()
    (work / "bin/gs").write_text("#!/bin/sh\ntouch $MARKER\n")
    (work / "bin/gs").chmod(0o755)
    os.environ["PATH"] = f"{work}/bin:{os.environ['PATH']}"


def references(work: Path, plans: dict[str, list[dict]]) -> dict[str, tuple[list, int]]:
    """The uninterrupted runs that the tries need: their folders, command lines and numbers of processes."""
    tries = [plan for part in plans.values() for plan in part]
    kinds = {kind for plan in tries for kind in (plan.get("kind"), *plan.get("moments", [plan.get("moment")]))}
    found = {}
    if "kills" in plans or "signals" in plans:
        found["one"] = training(work, work / "one/run"), 1
    if kinds & {"caching", "cached"}:
        found["cached"] = training(work, work / "cached/run", cached=True), 1
    if "torchrun" in kinds or any(plan.get("ranks") == 2 for plan in tries):
        found["two"] = training(work, work / "two/run"), 2
    surfaces = {surface for plan in tries for surface, _ in plan.get("inputs", ())}
    if "eval.py" in kinds or "kept" in surfaces:
        found["captions"] = captioning(work, work / "captions/result.json"), 1
    if "disks" in plans or "inputs" in plans:
        found["finished"] = short_training(work, work / "finished/run"), 1
    if "inputs" in plans:
        found["state"] = [*short_training(work, work / "state/cached"), "--cache-features"], 1
        found["flags"] = [*short_training(work, work / "flags/run"), "--write-config", work / "flags.json"], 1
    if kills := plans.get("restarts", [{}])[0].get("kills"):
        found["restarts"] = training(work, work / "restarts/run", steps=2 * kills + 8, eval_every=2 * kills + 8), 2
    return found


def make_reference(work: Path, name: str, words: list, ranks: int) -> None:
    """Run one of `references`, which has to succeed, and what is copied from it."""
    (work / name).mkdir(exist_ok=True)
    command = Command(words, work / name, ranks)
    in_time = command.wait(2 * PATIENCE)
    if not in_time or command.status:
        raise SystemExit(f"an uninterrupted command fails, so nothing can be compared: {words}\n{command.printed()}")
    if name == "finished":  # the same at step 2
        state = Path(shutil.copytree(work / "finished/run", work / "state/run"))
        shutil.rmtree(state / "step-000003")
        (state / "retrieval.json").unlink()
    if name == "captions":
        (work / "kept").mkdir()
        command = Command(captioning(work, work / "kept/result.json"), work / name)
        while command.running() and not any(path.stat().st_size for path in (work / "kept").rglob("*.jsonl")):
            time.sleep(0.002)
        command.kill()


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5, help="about how long, on a free machine: more tries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--again", default="", help="only the try of this name, as a failure has it; same other flags")
    parser.add_argument("--lanes", type=int, default=2, help="tries at once")
    for part in PARTS:
        parser.add_argument(f"--{part}", type=int, help=f"tries, {A_MINUTE[part]} a minute if not given")
    args = parser.parse_args(argv)
    counts = {part: getattr(args, part) for part in args.only.split(",")}
    counts = {part: round(args.minutes * A_MINUTE[part]) if n is None else n for part, n in counts.items()}
    plans = {part: PARTS[part][0](count, args.seed) for part, count in counts.items() if count}
    if args.again:
        plans = {part: chosen for part, some in plans.items() if (chosen := only(some, args.again))}
    print("python -m tests.faults --seed", args.seed, *(f"--{part} {n}" for part, n in counts.items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="faults-") as name, suppress(KeyboardInterrupt):
        work = Path(name)
        prepare(work)
        gc.collect()
        gc.freeze()  # its pages stay shared with the children
        with ProcessPoolExecutor(args.lanes, multiprocessing.get_context("fork")) as lanes:
            list(lanes.map(make_reference, *zip(*((work, n, *how) for n, how in references(work, plans).items()))))
            failures = {part: run_part(lanes, work, part, some) for part, some in plans.items()}
        return report(plans, failures)
    return 130


def only(plans: list[dict], name: str) -> list[dict]:
    """The try of that name, or that one input."""
    inputs = [pair for plan in plans for pair in plan.get("inputs", ()) if pair[1] == name]
    return [{"inputs": inputs, "seed": name}] if inputs else [plan for plan in plans if plan["seed"] == name]


def run_part(lanes, work: Path, part: str, plans: list[dict]) -> list[tuple[str, str, str]]:
    """Try all of a part -> its failures: the try, what is wrong, what was seen."""
    started, found = time.time(), []
    jobs = [(work, part, plan, work / f"{part}-{number}") for number, plan in enumerate(plans)]
    for plan, failures in zip(plans, lanes.map(run_try, *zip(*jobs))):
        found += [(plan["seed"], what, seen.replace(str(work), "W")) for what, seen in failures]
    print(f"{part}: {time.time() - started:.0f} s", flush=True)
    return found


def run_try(work: Path, part: str, plan: dict, folder: Path) -> Found:
    """One try, in a folder that is removed."""
    folder.mkdir()
    try:
        return PARTS[part][1](work, folder, plan)
    except Exception:
        return [("harness", traceback.format_exc().replace("\n", " | ")[-600:])]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report(plans: dict, failures: dict) -> int:
    """Print the table and the failures -> exit status."""
    table = [["", "tries", *WRONG, "harness", "not reached"]]
    for part, some in plans.items():
        counted = Counter(what for _, what, _ in failures[part])
        table.append([part, sum(plan.get("tries", 1) for plan in some), *(counted[what] for what in table[0][2:])])
    for row in table:
        print(f"{row[0]:9}", *(f"{cell:>{max(6, len(head))}}" for cell, head in zip(row[1:], table[0][1:])))
    alike = Counter()
    for part, some in failures.items():
        described = {plan["seed"]: plan for plan in plans[part]}
        for seed, what, seen in some:
            place = re.search(r" in \w+/?\w+\.py:\d+", seen)
            kind = what, place[0] if place else re.sub(r"<-.*|\d+|W\S*", "", seen)
            alike[kind] += what != "not reached"
            if 1 <= alike[kind] <= 3:
                how = {k: v for k, v in described[seed].items() if k not in ("seed", "tries", "inputs")}
                one = re.search(r"inputs \d+ \d+", seen) if part == "inputs" else None
                print(f"{what}: --again '{one[0] if one else seed}' {how or ''}: {seen}")
    for (what, seen), count in alike.items():
        if count > 3:
            print(f"and {count - 3} more like: {what}: {seen[:150]}")
    return int(any(alike.values()))


if __name__ == "__main__":
    sys.exit(main())
