"""`cloze prove-resume PRESET`: a preset in, the proof that its runs survive being killed out.

Real processes of the preset, in a scratch folder: one run unbroken, one killed with SIGKILL and resumed at
each world size. Every step and the final weights are compared. At the world size it was killed at all must
be equal bit for bit; at others the rows, and the losses but for rounding.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.batch import Reader
from launcher.proof_compare import Difference, compare
from launcher.proof_runs import copy_run, processes, run_and_kill, run_to_end
from launcher.tables import text_table
from trainer.checkpoint_files import list_checkpoints, step_of
from trainer.config import RunConfig, load_config, to_yaml
from trainer.phases import settings_at

DEFAULT_STEPS = 12
LOSS_BOUND = {"fp32": 1e-5, "bf16": 1e-2}  # relative, at another world size


@dataclass(frozen=True)
class Plan:
    run: RunConfig
    world_sizes: tuple[int, ...]  # the first is that of the unbroken and of the killed run
    kill_at: tuple[int, ...]  # steps, ascending


@dataclass(frozen=True)
class Outcome:
    """Of one continuation of the killed run."""

    world_size: int
    resumed_step: int
    seconds: float
    difference: Difference
    bound: float | None  # of the losses; None: all must be equal

    @property
    def problem(self) -> str | None:
        return self.difference.problem(self.bound)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("preset", type=Path, help="YAML file, e.g. configs/tiny.yaml")
    add("overrides", nargs="*", help="key=value, e.g. deepspeed=ds_configs/zero3.json")
    add("--steps", type=int, default=DEFAULT_STEPS, help="of each run (default: %(default)s)")
    add("--kill-at", type=_numbers, help="steps, e.g. 3,8 (default: two thirds of the steps)")
    add(
        "--world-sizes",
        type=_numbers,
        help="processes: of the unbroken and the killed run, then of others to resume it with "
        "(default: all GPUs and half of them; without GPUs 2,1)",
    )
    add("--scratch", type=Path, help="where the runs are made (default: the system's)")
    add("--keep", action="store_true", help="leave the runs there")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def run(options: argparse.Namespace) -> int:
    """0: proved, 1: not. ValueError when the preset, or what is asked for, does not fit."""
    plan = plan_of(options)
    if options.scratch:
        options.scratch.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="cloze-proof-", dir=options.scratch))
    try:
        outcomes = prove(plan, scratch)
    finally:
        if options.keep:
            print(f"the runs are in {scratch}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    print(report(plan, outcomes))
    return int(any(outcome.problem for outcome in outcomes))


def plan_of(options: argparse.Namespace) -> Plan:
    """ValueError, all problems in one message."""
    config = load_config(options.preset, options.overrides)
    num_gpus = _num_gpus()
    sizes = options.world_sizes or _default_world_sizes(num_gpus)
    kill_at = tuple(sorted(options.kill_at or (max(1, options.steps * 2 // 3),)))
    problems = [f"--world-sizes: {size} is below 1" for size in sizes if size < 1]
    problems += [
        f"--kill-at {s} is not in 1 to {options.steps - 1}"
        for s in kill_at
        if not 0 < s < options.steps
    ]
    if num_gpus and max(sizes) > num_gpus:
        problems.append(f"--world-sizes: {max(sizes)} is over the {num_gpus} GPUs of this machine")
    if options.steps < 3:
        problems.append(f"--steps {options.steps} is below 3")
    if problems:
        raise ValueError("; ".join(problems))
    short = shortened(config, options.steps, max(sizes))
    for size in sizes:
        for step in (0, *(phase.first_step for phase in short.phases)):
            settings = settings_at(short, step)
            Reader(0, size, settings.micro_batch_size, settings.global_batch_size, short.seed)
    return Plan(short, sizes, kill_at)


def _num_gpus() -> int:
    import torch  # takes a second: not before the command line is known to be right

    return torch.cuda.device_count()


def _default_world_sizes(num_gpus: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys((num_gpus, max(1, num_gpus // 2)))) if num_gpus else (2, 1)


def shortened(config: RunConfig, steps: int, world_size: int) -> RunConfig:
    """The preset's run with few steps, all logged, some saved, and the least held-out rows."""
    return replace(
        config,
        steps=steps,
        log_every=1,
        eval_every=0,
        eval_rows=world_size * config.micro_batch_size,
        save_every=max(1, steps // 4),
        keep_every=0,
        verify_hf="weights",
        time_limit_minutes=None,
        phases=tuple(phase for phase in config.phases if phase.first_step < steps),
        optim=replace(config.optim, warmup_steps=min(config.optim.warmup_steps, steps // 2)),
    )


def prove(plan: Plan, scratch: Path) -> list[Outcome]:
    """Make all the runs, and compare. ValueError when one does not even run."""
    first = plan.world_sizes[0]
    unbroken, killed = scratch / "unbroken", scratch / "killed"
    seconds = run_to_end(_preset(plan, unbroken), first, scratch / "unbroken.log")
    print(f"unbroken: {plan.run.steps} steps in {processes(first)}, {seconds:.0f} s", flush=True)
    for step in plan.kill_at:
        reached = run_and_kill(_preset(plan, killed), first, scratch / "killed.log", killed, step)
        print(f"killed at step {reached}, its newest checkpoint {_newest(killed)}", flush=True)
    outcomes = []
    for number, size in enumerate(plan.world_sizes):
        resumed = scratch / f"resumed-{number}-{size}"
        copy_run(killed, resumed)
        start = _newest(resumed)
        seconds = run_to_end(_preset(plan, resumed), size, resumed.with_suffix(".log"))
        print(f"resumed at step {start} in {processes(size)}, {seconds:.0f} s", flush=True)
        bound = None if size == first else LOSS_BOUND[plan.run.precision]
        outcomes.append(Outcome(size, start, seconds, compare(unbroken, resumed), bound))
    return outcomes


def _preset(plan: Plan, run: Path) -> Path:
    path = run.with_suffix(".yaml")
    path.write_text(to_yaml(replace(plan.run, dir=str(run))), encoding="utf-8")
    return path


def _newest(run: Path) -> int:
    """Step of the newest checkpoint; 0 without one."""
    return max(map(step_of, list_checkpoints(run)), default=0)


def report(plan: Plan, outcomes: Sequence[Outcome]) -> str:
    """A line for each continuation, and the verdict."""
    columns = {
        "rows": "rows_digest",
        "learning rate": "learning_rate",
        "loss": "loss",
        "gradient norm": "grad_norm",
        "weights, moments": "weights",
    }
    rows = [
        (
            f"{plan.world_sizes[0]} -> {outcome.world_size}",
            str(outcome.resumed_step),
            *(_shown(outcome.difference.largest[name]) for name in columns.values()),
            "equal" if outcome.bound is None else f"loss within {outcome.bound:g}",
            "FAILED" if outcome.problem else "kept",
        )
        for outcome in outcomes
    ]
    table = text_table(("processes", "from step", *columns, "promise", "verdict"), rows)
    failed = [f"in {processes(o.world_size)}: {o.problem}" for o in outcomes if o.problem]
    what = f"{plan.run.steps} steps in {plan.run.precision}, killed at {', '.join(map(str, plan.kill_at))}"
    if failed:
        return "\n".join(["", table, "", f"NOT PROVED ({what})", *failed])
    equal = f"bit for bit in {processes(plan.world_sizes[0])}"
    others = [str(outcome.world_size) for outcome in outcomes if outcome.bound is not None]
    rounded = f", on the same rows and but for rounding in {', '.join(others)}" if others else ""
    verdict = f"PROVED: every step is that of the unbroken run, {equal}{rounded} ({what})"
    return "\n".join(["", table, "", verdict])


def _shown(difference: float) -> str:
    return "equal" if difference == 0 else f"{difference:.1e}"
