"""A run's status in, the text that a person reads out."""

import math
import time
from typing import TYPE_CHECKING, Any

from launcher.curve import draw
from launcher.goodput import PARTS, Account
from launcher.jobs import Job
from launcher.probe_text import newest_probes_text
from launcher.tables import bytes_text, text_table
from trainer.thermometer import losses_text, readings_of

if TYPE_CHECKING:
    from launcher.status import Status

NUM_JOBS, NUM_EVENTS = 12, 8  # the last ones are shown


def status_text(status: "Status", *, ascii_only: bool) -> str:
    """Parts with an empty line between them; a part of which nothing is known is left out."""
    points = [
        (line["step"], line["loss"])
        for line in status.train
        if math.isfinite(line.get("loss", math.nan))
    ]
    parts = [
        "\n".join(_head(status)),
        draw(points, ascii_only=ascii_only),
        _learned(status),
        _goodput(status.account) if status.account else "",
        _jobs(status),
        "\n".join(_checkpoints(status)),
        "\n".join(_events(status)),
        f"hint: {status.hint}" if status.hint else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _head(status: "Status") -> list[str]:
    owner, num_steps = status.owner, status.num_steps
    place = " on ".join(
        [*([f"pid {owner.pid}"] if owner.pid else []), *([owner.host] if owner.host else [])]
    )
    shown = status.state in ("running", "unknown") and place
    lines = [f"{status.run}: {status.state}{f' ({place})' if shown else ''}"]
    of_steps = f" of {num_steps:,} ({status.step / num_steps:.1%})" if num_steps else ""
    facts = [f"step {status.step:,}{of_steps}"]
    last = status.train[-1] if status.train else {}
    if "num_tokens" in last:
        facts.append(f"{last['num_tokens']:,} tokens")
    if status.eta_seconds is not None:
        facts.append(f"ETA {duration(status.eta_seconds)}")
    lines.append(", ".join(facts))
    if last:
        lines.append(f"at step {last['step']:,}: " + ", ".join(_measures(last)))
    if status.heldout:
        lines.append(
            f"held out at step {status.heldout['step']:,}: " + ", ".join(_losses(status.heldout))
        )
        lines += [
            f"  of {name}: " + ", ".join(_losses(v))
            for name, v in status.heldout.get("sources", {}).items()
        ]
    if text := newest_probes_text(status.probes):
        lines.append(text)
    if status.jobs and status.state not in ("running", "finished"):
        job = status.jobs[-1]
        message = job.end.message if job.end else ""
        lines.append(f"last sign of life {_when(job.last_time)}{f': {message}' if message else ''}")
    return lines


def _learned(status: "Status") -> str:
    """Of every task, what its held-out loss says beside that of guessing and of our own runs."""
    line = status.heldout or {}
    rows = []
    for reading in readings_of(line):
        guess = reading.line
        band = line.get("reference", {}).get(reading.task)
        guessed = "" if guess is None or guess.accuracy is None else f"{guess.accuracy:.1%}"
        rows.append(
            (
                reading.task,
                reading.words,
                f"{reading.loss:.3f}",
                "" if guess is None else f"{guess.loss_nats:.3f}",
                f"{band[0]:.3f} to {band[1]:.3f}" if band else "",
                f"{reading.accuracy:.1%}",
                guessed,
            )
        )
    header = (
        "learned so far", "", "nats", "by guessing", "our own runs, as early", "right", "by guessing",
    )  # fmt: skip
    return text_table(header, rows) if rows else ""


def _measures(line: dict[str, Any]) -> list[str]:
    shown = _losses(line)
    formats = {
        "learning_rate": "learning rate {:.2e}",
        "grad_norm": "gradient norm {:.3g}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "step_seconds": "{:.3g} s a step",
        "data_wait_fraction": "data wait {:.0%}",
        "mfu": "MFU {:.1%}",
    }
    return shown + [how.format(line[name]) for name, how in formats.items() if name in line]


def _losses(line: dict[str, Any]) -> list[str]:
    together = [f"loss {line['loss']:.4f}"] if "loss" in line else []
    return together + losses_text(line)


def _goodput(account: Account) -> str:
    wall = account.wall_seconds
    rows = [
        (PARTS[name], duration(seconds), f"{seconds / wall:.1%}")
        for name, seconds in account.seconds.items()
        if abs(seconds) >= 0.0005 * wall
    ]
    jobs = f"{account.num_jobs} job{'s' if account.num_jobs > 1 else ''}"
    repeated = f", {account.num_repeated:,} steps done again" if account.num_repeated else ""
    return (
        f"goodput {account.goodput:.1%} of {duration(wall)} over {jobs}{repeated}\n"
        + text_table(("", "time", "share"), rows)
    )


def _jobs(status: "Status") -> str:
    if not status.jobs:
        return ""
    rows = []
    for job in status.jobs[-NUM_JOBS:]:
        stage = "" if job.zero_stage is None else f"{job.zero_stage}"
        rows.append(
            (
                _when(job.time),
                duration(job.last_time - job.time),
                job.host or "",
                "" if job.world_size is None else str(job.world_size),
                stage,
                str(job.resumed_step),
                str(job.last_step),
                how_it_ended(status, job),
            )
        )
    header = ("job began", "lasted", "host", "ranks", "ZeRO", "from step", "to step", "ended")
    left_out = len(status.jobs) - len(rows)
    return text_table(header, rows) + (
        f"\n{left_out} earlier jobs are not shown" if left_out else ""
    )


def how_it_ended(status: "Status", job: Job) -> str:
    """'running', 'killed', or what the job itself said."""
    if job.end is not None:
        return job.end.status
    return status.state if job is status.jobs[-1] else "killed"


def _checkpoints(status: "Status") -> list[str]:
    lines = []
    if status.checkpoints:
        newest = status.checkpoints[-1]
        total = sum(checkpoint.num_bytes for checkpoint in status.checkpoints)
        steps = ", ".join(f"{checkpoint.step:,}" for checkpoint in status.checkpoints[-8:])
        lines.append(
            f"newest checkpoint: step {newest.step:,}, {bytes_text(newest.num_bytes)}, of "
            f"{_when(newest.time)}; {len(status.checkpoints)} in all (steps {steps}), {bytes_text(total)}"
        )
    return lines + status.problems


def _events(status: "Status") -> list[str]:
    events = [event for job in status.jobs for event in job.events]
    lines = [
        f"{_when(event.time)}  {'' if event.step is None else f'step {event.step:,}  '}{event.what}"
        + (f": {event.message}" if event.message else "")
        for event in events[-NUM_EVENTS:]
    ]
    left_out = len(events) - len(lines)
    return [*([f"{left_out} earlier events are not shown"] if left_out else []), *lines]


def duration(seconds: float) -> str:
    """'1:02:03'; tenths of a second below a minute."""
    if abs(seconds) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _when(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
