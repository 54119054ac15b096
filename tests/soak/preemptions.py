"""Numbers of trials in, how many steps were lost by asking a run to stop out: 0, by whatever launcher and way.

    python tests/soak/preemptions.py --trials 100 --folder /scratch/preemptions [--minutes 15]

One run of a small BERT on two processes is asked to stop at a random moment, and the same command goes on, by
`cloze train`, torchrun and deepspeed in turn. It is asked by a signal to the launcher, to one rank, or to every
process (as Slurm and Ctrl-C do), by a time limit, or by a STOP file; in half of the trials loader processes
make the batches. After each trial the newest checkpoint has to be of the last step that was made, and nobody
may be left; at the end the curve and the weights have to be those of a run that nobody asked.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "soak")]

from support import environment, free_port, read_metrics, tiny_preset  # noqa: E402
from train_faults import EXACT, make_dataset, ranks_of  # noqa: E402

from launcher.supervise import descendants  # noqa: E402
from trainer.checkpoint_files import list_checkpoints, problems_of, step_of  # noqa: E402
from trainer.stopping import PLANNED, STOP_FILE  # noqa: E402

LAUNCHERS = ("cloze train", "torchrun", "deepspeed")
WAYS = ("launcher", "rank", "everyone", "launcher", "everyone", "time limit", "stop file")
ENDLESS = 10_000_000  # steps
FIRST_STEP_SECONDS = 120.0  # for a start to make its first new step
GONE_SECONDS = 60.0  # for all of a job to be gone
LIMIT_MINUTES = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60, help="no trial begins after so many")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    dataset = make_dataset(options.folder)
    preset = make_preset(options.folder / "asked", dataset)
    run, rng, began = (
        options.folder / "asked" / "run",
        random.Random(options.seed),
        time.monotonic(),
    )
    lost: list[int] = []
    done: Counter[str] = Counter()
    while len(lost) < options.trials and time.monotonic() - began < 60 * options.minutes:
        launcher, way = LAUNCHERS[len(lost) % 3], rng.choice(WAYS)
        lost.append(trial(preset, run, launcher, way, rng))
        done.update((launcher, way))
        print(f"{time.monotonic() - began:6.0f} s  {launcher}, {way}: {lost[-1]} lost", flush=True)
    print(f"{len(lost)} trials, {sum(lost)} steps lost: {json.dumps(dict(sorted(done.items())))}")
    equal = is_the_unasked(run, make_preset(options.folder / "unasked", dataset))
    sys.exit(0 if equal and not any(lost) else "FAILED")


def make_preset(folder: Path, dataset: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    optim = {"warmup_steps": 20, "schedule": "constant"}
    return tiny_preset(
        folder, dataset, steps=ENDLESS, save_every=15, eval_every=10, precision="bf16", optim=optim
    )


def trial(preset: Path, run: Path, launcher: str, way: str, rng: random.Random) -> int:
    """Start, ask, wait until all is gone. Returns the steps that were made and not saved."""
    before = newest_step(run)
    overrides = [f"data.num_workers={rng.choice((0, 2))}"]
    if way == "time limit":
        overrides.append(f"time_limit_minutes={LIMIT_MINUTES}")
    with (run.parent / "log").open("ab") as log:
        process = subprocess.Popen(
            [*command_of(launcher), str(preset), *overrides], cwd=ROOT, env=environment(), stdout=log,
            stderr=log, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + FIRST_STEP_SECONDS
    while last_step(run) <= before:
        assert process.poll() is None, f"{launcher} ended before its first step: see {log.name}"
        assert time.monotonic() < deadline, f"no step after {FIRST_STEP_SECONDS} s: see {log.name}"
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 2.5))
    ask(process.pid, launcher, way, run, rng)
    wait_until_gone(preset)
    status = process.wait(timeout=GONE_SECONDS)
    assert launcher != "cloze train" or status == 75, f"status {status}: see {log.name}"
    end = json.loads((run / "jobs.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert (end["kind"], end.get("exit_status")) == ("end", 75), end
    assert problems_of(list_checkpoints(run)[-1]) == []
    return last_step(run) - newest_step(run)


def command_of(launcher: str) -> list[str]:
    module = ["-m", "launcher.train"]
    signals = ",".join(number.name for number in PLANNED)
    return {
        "cloze train": [sys.executable, "-m", "launcher.cli", "train", "--processes", "2"],
        "torchrun": [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            f"--signals-to-handle={signals}", *module,
        ],
        "deepspeed": [
            str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port",
            str(free_port()), "--module", "launcher.train",
        ],
    }[launcher]  # fmt: skip


def ask(pid: int, launcher: str, way: str, run: Path, rng: random.Random) -> None:
    number = rng.choice(PLANNED)
    if way == "stop file":
        (run / STOP_FILE).touch()
    elif way == "rank":
        os.kill(rng.choice(ranks_of(pid)), number)
    elif way == "everyone":
        for each in (pid, *descendants(pid)):
            os.kill(each, number)
    elif way == "launcher":
        # `deepspeed` starts the process that starts the ranks, and tells it nothing when it is ended itself
        os.kill(min(children_of(pid)) if launcher == "deepspeed" else pid, number)


def children_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [int(child) for child in children.split()]


def wait_until_gone(preset: Path) -> None:
    deadline = time.monotonic() + GONE_SECONDS
    while left := processes_with(preset):
        assert time.monotonic() < deadline, f"processes are left: {left}"
        time.sleep(0.05)


def processes_with(preset: Path) -> list[int]:
    """Those that have the preset on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if str(preset).encode() in command.split(b"\0"):
            found.append(int(entry.name))
    return found


def last_step(run: Path) -> int:
    metrics = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    return metrics[-1]["step"] if metrics else 0


def newest_step(run: Path) -> int:
    return max(map(step_of, list_checkpoints(run)), default=0)


def is_the_unasked(run: Path, preset: Path) -> bool:
    """Whether a run of as many steps in one piece has the same curve and the same weights."""
    whole, steps = preset.parent / "run", newest_step(run)
    command = [*command_of("cloze train"), str(preset), f"steps={steps}"]
    subprocess.run(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, check=True, timeout=3600
    )
    curves = [
        [[m[name] for name in EXACT] for m in read_metrics(folder)] for folder in (run, whole)
    ]
    weights = [
        (list_checkpoints(folder)[-1] / "hf" / "model.safetensors").read_bytes()
        for folder in (run, whole)
    ]
    same = curves[0] == curves[1], weights[0] == weights[1]
    print(f"{steps} steps; curves equal: {same[0]}; weights equal: {same[1]}")
    return all(same)


if __name__ == "__main__":
    main()
