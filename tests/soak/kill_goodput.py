"""Minutes and a mean time between kills in; goodput, detection and recovery, and the simulator's guess, out.

    python tests/soak/kill_goodput.py --minutes 20 --mtti 120 --folder /scratch/goodput [--stopped]

One `cloze train --processes 2` of a small BERT, which goes on by itself. A random rank is sent SIGKILL (with
--stopped: SIGSTOP, a rank that hangs) in a Poisson process, also while a job starts. Measured for each fault:

    detected     until `cloze train` says that the job has ended, and nothing is left of it
    recovered    until the first new step
    steps lost   completed and done again

Goodput is that of `cloze status`. `bench.goodput` then plays the same costs and the same mean time between
faults: both are to agree within two points.
"""

import argparse
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "soak")]

from support import environment, tiny_preset  # noqa: E402
from train_faults import make_dataset, ranks_of  # noqa: E402

from bench.goodput import simulate  # noqa: E402
from launcher.goodput import PARTS, Account, account_of  # noqa: E402
from launcher.jobs import Job, read_jobs  # noqa: E402
from launcher.save_interval import Costs, measured_costs  # noqa: E402

ENDED = "starting again"  # of `cloze train`, when nothing of a job is left
HANG_SECONDS = 10
MODEL = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512,
    "max_position_embeddings": 128, "attention": "eager",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--mtti", type=float, default=120, help="mean seconds between two faults")
    parser.add_argument("--save-every", type=int, default=20, help="steps")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--stopped", action="store_true", help="SIGSTOP instead of SIGKILL")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    dataset = make_dataset(options.folder)
    preset = tiny_preset(
        options.folder, dataset, steps=10_000_000, global_batch_size=32, micro_batch_size=8,
        precision="bf16", save_every=options.save_every, hang_timeout_seconds=HANG_SECONDS, model=MODEL,
        data={"sequence_length": 128}, optim={"schedule": "constant"},
    )  # fmt: skip
    number = signal.SIGSTOP if options.stopped else signal.SIGKILL
    faults, ends, lost = train_under_faults(preset, number, options)
    jobs = read_jobs(options.folder / "run")
    account = account_of(jobs)
    assert account is not None
    report(jobs, account, faults, ends, lost, options.save_every)


def train_under_faults(
    preset: Path, number: signal.Signals, options: argparse.Namespace
) -> tuple[list[float], list[float], list[int]]:
    """Moments (unix seconds) of the faults, and of the ends of jobs; steps that had to be done again."""
    command = [sys.executable, "-m", "launcher.cli", "train", str(preset), "--processes", "2"]
    faults: list[float] = []
    ends: list[float] = []
    lost: list[int] = []
    rng = random.Random(options.seed)
    with (options.folder / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, "--restarts", "1000"], cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        listener = threading.Thread(target=listen, args=(process, log, ends, lost))
        listener.start()
        stop_at = time.time() + 60 * options.minutes
        while (due := time.time() + rng.expovariate(1 / options.mtti)) < stop_at:
            time.sleep(max(0.0, due - time.time()))
            ranks = ranks_of(process.pid)
            if ranks:  # between two jobs there is nobody to be hit
                os.kill(rng.choice(ranks), number)
                faults.append(time.time())
        time.sleep(max(0.0, stop_at - time.time()))
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75
        listener.join()
    return faults, ends, lost


def listen(process: subprocess.Popen[str], log: TextIO, ends: list[float], lost: list[int]) -> None:
    """Copy what it says into the log; note when a job has ended, and the steps that its next one does again."""
    assert process.stdout is not None
    done = 0
    for line in process.stdout:
        log.write(line)
        if step := re.match(r"step (\d+)/", line):
            done = int(step[1])
        elif resumed := re.match(r"resuming from .*step-(\d+)$", line):
            lost.append(done - int(resumed[1]))
        elif ENDED in line:
            ends.append(time.time())


def report(
    jobs: list[Job],
    account: Account,
    faults: list[float],
    ends: list[float],
    lost: list[int],
    save_every: int,
) -> None:
    detected, recovered = [], []
    first_steps = [job.marks[0].time for job in jobs if job.marks]
    for fault, following in zip(faults, [*faults[1:], float("inf")], strict=True):
        end = next((moment for moment in ends if moment > fault), float("inf"))
        step = next((moment for moment in first_steps if moment > end), float("inf"))
        if step < following:  # else another fault came before it had gone on
            detected.append(end - fault)
            recovered.append(step - fault)
    wall = account.wall_seconds
    print(f"{wall:.0f} s, {len(faults)} faults, {len(jobs)} jobs, {account.num_steps} steps kept")
    print(f"goodput {account.goodput:.2%}")
    for part, words in PARTS.items():
        if account.seconds[part] > 0.0005 * wall:
            print(f"    {words:<32} {account.seconds[part] / wall:7.2%}")
    print(f"parts sum to {sum(account.seconds.values()) / wall:.4%} of the wall time")
    for words, seconds in (("detected", detected), ("recovered", recovered)):
        ordered = sorted(seconds)
        p95 = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
        print(
            f"{words}: median {statistics.median(ordered):.2f} s, p95 {p95:.2f} s, of {len(ordered)}"
        )
    print(
        f"steps lost a fault: mean {statistics.mean(lost):.1f}, most {max(lost)} (saves every {save_every})"
    )
    known = measured_costs(jobs)
    assert known is not None
    mtti = wall / len(faults)
    costs = Costs(known.step, known.stall, mtti, write=1.0, restart=statistics.mean(recovered))
    print(f"costs: {costs}")
    guess = simulate(save_every, costs).goodput
    # a simulated step has its wait for data and its logging in it
    counted = sum(account.seconds[part] for part in ("useful", "data", "log")) / wall
    print(f"steps that count, with data and logging: {counted:.2%}; simulated: {guess:.2%}")


if __name__ == "__main__":
    main()
