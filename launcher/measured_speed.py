"""A run's folder, or a step's seconds, in; how many operations a rank does in a second out."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from launcher.cost_model import Links, recomputed, step_time
from launcher.jobs import json_lines, read_jobs
from launcher.memory_plan import Rank, zero_of
from trainer.config import RunConfig, load_config
from trainer.phases import settings_at


class Measured(NamedTuple):
    rank: Rank
    step_seconds: float  # median of what was logged


def calibrated(
    rank: Rank, flops: float, step_seconds: float, memory_per_second: float, links: Links
) -> float:
    """FLOP/s of a rank while it computes, if a step takes so long, none of its exchange hidden. ValueError."""
    one = step_time(
        rank, flops, flops_per_second=1.0, memory_per_second=memory_per_second, links=links
    )
    others = one.exchange + one.update
    if others >= step_seconds:
        raise ValueError(
            f"a step is said to take {step_seconds:g} s, and its exchange and update alone {others:.3g} s: "
            "state faster links, or memory (--link-gb-per-second, --memory-gb-per-second)"
        )
    return flops * recomputed(rank) / rank.world_size / (step_seconds - others)


def seconds_of_run(
    run: Path, vocab_size: int, device: str, rank_of: Callable[..., Rank]
) -> Measured:
    """Of its last job's steps in the phase that it was in. ValueError when the run tells no speed."""
    config, jobs = _config(run), read_jobs(run)
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = [line for line in json_lines(text) if line.get("kind") == "train" and "step" in line]
    if not jobs or jobs[-1].world_size is None or len(lines) < 2:
        raise ValueError(
            f"{run} tells no speed: it needs a job, and two lines of steps in metrics.jsonl"
        )
    last = settings_at(config, lines[-1]["step"] - 1)
    first = max(
        [0, *(phase.first_step for phase in config.phases if phase.first_step < lines[-1]["step"])]
    )
    # the first line of a job has its warm-up in it
    begin = max(first, jobs[-1].resumed_step + config.log_every)
    seconds = [line["step_seconds"] for line in lines if line["step"] > begin]
    if not seconds:
        raise ValueError(f"{run}: its last job has logged no step after its first line")
    zero = zero_of(json.loads((run / "deepspeed.json").read_text(encoding="utf-8")))
    rank = rank_of(config, last, zero, vocab_size, jobs[-1].world_size, device)
    return Measured(rank, statistics.median(seconds))


def _config(run: Path) -> RunConfig:
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is no run: it has no config.yaml")
    return load_config(run / "config.yaml", [])
