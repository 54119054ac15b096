"""A preset in; what the trainer adds to a step, and how long a checkpoint stops it, out.

    python -m bench.trainer PRESET [key=value ...] [--steps 40] [--saves 4] [--repeats 3]

Four runs of the same steps, each in a process of its own, repeated in turn:

    no saves        the trainer's own overhead: data, counts, logging
    background      as it is: training goes on while the checkpoint is written
    blocking        training waits until the checkpoint is published
    raw             training waits for torch.save of the same tensors into one file, with fsync, and no more

"waits" is the time in which no step is made; "costs" is by how much the whole takes longer than without saves,
per save, where the writer takes time from the steps too (it shares their cores here).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from trainer.activity import Activity

WAYS = ("no saves", "background", "blocking", "raw")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("preset")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            command = [sys.executable, "-m", "bench.trainer", *sys.argv[1:], "--way", way]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[way].append(json.loads(output.splitlines()[-1]))
    print(report(found, options.saves))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One run in this process. Seconds by activity, of the steps after the first few."""
    from launcher.train import _settle_deepspeed
    from trainer import loop
    from trainer.config import load_config
    from trainer.engine import start_world
    from trainer.stopping import StopRequest

    _settle_deepspeed()
    every = options.steps // options.saves
    change_saver(options.way)
    activity = Activity()
    warm, ended = note_times(loop, activity, warm_steps=every - 1)
    with tempfile.TemporaryDirectory() as folder:
        run = load_config(
            Path(options.preset),
            [
                *options.overrides, f"dir={folder}/run", f"steps={options.steps + every}", "eval_every=0",
                "eval_rows=1", f"save_every={0 if options.way == 'no saves' else every}",
            ],
        )  # fmt: skip
        loop.between_steps = _without_the_end(loop.between_steps, run.steps)
        loop.train(run, start_world(), activity, StopRequest())
        newest = max(Path(folder, "run").glob("checkpoints/step-*"), default=Path(folder))
        megabytes = sum(p.stat().st_size for p in newest.rglob("*") if p.is_file()) / 1e6
    seconds = {name: ended[name] - warm[name] for name in activity.seconds}
    wall = ended["at"] - warm["at"]
    return {"seconds": seconds, "wall": wall, "steps": options.steps + 1, "megabytes": megabytes}


def change_saver(way: str) -> None:
    """Make checkpoints block, or be no more than a file of torch.save."""
    from trainer import saver

    begin = saver.Saver.begin

    def begin_and_wait(self: saver.Saver, document: dict[str, Any], write_hf: Any) -> list[str]:
        return begin(self, document, write_hf) + self.wait()

    def save_raw(self: saver.Saver, document: dict[str, Any], write_hf: Any) -> list[str]:
        host: dict[str, torch.Tensor] = {}
        saver.copy_to_host(self.named, self.world, host)
        with (Path(self.run.dir) / "raw.pt").open("wb") as file:
            torch.save(host, file)
            os.fsync(file.fileno())
        self.saved_step = document["step"]
        return []

    if way == "blocking":
        saver.Saver.begin = begin_and_wait
    if way == "raw":
        saver.Saver.begin = save_raw


def note_times(
    loop: Any, activity: Activity, warm_steps: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Two dicts to be filled: seconds by activity after `warm_steps`, and at the last step's end."""
    warm: dict[str, float] = {}
    ended: dict[str, float] = {}
    step_done, end_job = Activity.step_done, loop.end_job

    def watched(self: Activity, step: int) -> None:
        step_done(self, step)
        if step == warm_steps:
            self.enter(self.current)
            warm.update({**self.seconds, "at": time.monotonic()})

    def watched_end(*arguments: Any) -> None:
        activity.enter("startup")  # what comes now is none of the steps'
        ended.update({**activity.seconds, "at": time.monotonic()})
        end_job(*arguments)

    Activity.step_done, loop.end_job = watched, watched_end
    return warm, ended


def _without_the_end(between_steps: Any, steps: int) -> Any:
    """The last evaluation and checkpoint are not of the steps."""

    def between(run: Any, job: Any, state: Any, *rest: Any) -> None:
        if state.step != steps:
            between_steps(run, job, state, *rest)

    return between


def report(found: dict[str, list[dict[str, Any]]], num_saves: int) -> str:
    """A table of medians, with the lowest and highest in brackets."""

    def of(way: str, value: Any) -> tuple[float, str]:
        values = sorted(value(run) for run in found[way])
        middle = statistics.median(values)
        return middle, f"{middle:.3f} ({values[0]:.3f} to {values[-1]:.3f})"

    def overhead(run: dict[str, Any]) -> float:
        seconds = run["seconds"]
        own = seconds["data"] + seconds["counts"] + seconds["log"]
        return 100 * own / (own + seconds["forward"] + seconds["backward"] + seconds["optimizer"])

    without, _ = of("no saves", lambda run: run["wall"])
    step, shown = of("no saves", lambda run: 1000 * run["wall"] / run["steps"])
    lines = [
        f"step: {shown} ms; the trainer's own part: {of('no saves', overhead)[1]} %",
        f"checkpoint: {of('background', lambda run: run['megabytes'])[0]:,.0f} MB",
        "",
        "| checkpoint | training waits, s | a save costs, s |",
        "| --- | --- | --- |",
    ]
    for way in WAYS[1:]:
        waits = of(way, lambda run: run["seconds"]["save"] / num_saves)
        costs = of(way, lambda run: (run["wall"] - without) / num_saves)
        lines.append(f"| {way} | {waits[1]} | {costs[1]} |")
    stall = of("background", lambda run: run["seconds"]["save"])[0]
    blocking = of("blocking", lambda run: run["seconds"]["save"])[0]
    lines.append(f"\nbackground waits {100 * stall / blocking:.1f} % of what blocking waits")
    assert step > 0
    return "\n".join(lines)


if __name__ == "__main__":
    main()
