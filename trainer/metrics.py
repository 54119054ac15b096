"""Losses and counts of steps in; a line to read, a line of metrics.jsonl and TensorBoard scalars out."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from data.objectives import TASKS
from model.heads import TaskLoss
from trainer.activity import Activity
from trainer.config import RunConfig
from trainer.files import write_atomically
from trainer.state import TrainState
from trainer.task_losses import Totals, stack
from trainer.thermometer import losses_text, readings_of, sentence
from trainer.world import World

# TensorBoard tag of each logged value. What a person looks for comes first.
TAGS = {
    "loss": "train/loss",
    **{f"{task}_loss": f"train/{task}_loss" for task in TASKS},
    **{f"{task}_accuracy": f"train/{task}_accuracy" for task in TASKS},
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "num_skipped_steps": "train/skipped_steps",
    "num_tokens": "train/tokens",
    "tokens_per_second": "train/tokens_per_second",
    "step_seconds": "train/step_seconds",
    "data_wait_fraction": "train/data_wait_fraction",
    "mfu": "train/mfu",
}


class Metrics:
    """Collects over a window of steps; `gather_step` is where training waits for the device."""

    def __init__(
        self,
        run: RunConfig,
        world: World,
        start: TrainState,
        *,
        activity: Activity,
        peak_flops: float | None,
    ) -> None:
        self.world, self.num_steps, self.peak_flops = world, run.steps, peak_flops
        self._activity = activity
        self.run_dir = Path(run.dir)
        self.tasks, self._loss_weights = run.model.tasks, run.loss_weights
        self._step = Totals.zeros(self.tasks, world.device)
        self._gathered = Totals.zeros(self.tasks)
        self._file = self._writer = None
        self.last_train: dict[str, Any] = {}  # what was logged of training last
        self.begin(start)

    def begin(self, state: TrainState) -> None:
        """Go on from `state`: what was logged of later steps is dropped, for they come again."""
        self._window = Totals.zeros(self.tasks)
        self._flops, self._before, self._window_state = 0, self._activity.accounted(), state
        if not self.world.is_main:
            return
        if self._file and self._writer:
            self._file.close()
            self._writer.close()
        forget_after(self.run_dir / "metrics.jsonl", state.step)
        self._file = (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=state.step + 1)
        self._writer.add_custom_scalars({"does it learn?": thermometer_charts(self.tasks)})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file and self._writer:
            self._file.close()
            self._writer.close()

    def add(self, losses: Mapping[str, TaskLoss]) -> None:
        """One micro-batch of this rank; stays on the device."""
        self._step.sums.add_(stack(losses))

    def gather_step(self) -> None:
        """Sum the step's losses over all ranks, and fetch them. Collective.

        Best just before the optimizer's update, which waits for the device too: then the device has the update
        to do while the next step is made ready.
        """
        if self.world.size > 1:
            dist.all_reduce(self._step.sums)
        self._gathered = Totals(self.tasks, self._step.sums.to("cpu", copy=True))
        self._step.sums.zero_()

    def end_step(self, flops: int, grad_norm: float, loss_weights: dict[str, float]) -> float:
        """The loss over all ranks of the step that was gathered last. flops: over all ranks too.

        A step without a finite gradient changed nothing, and counts for no average.
        """
        if math.isfinite(grad_norm):
            self._window.sums.add_(self._gathered.sums)
        self._flops, self._loss_weights = self._flops + flops, loss_weights
        return self._gathered.averages(loss_weights).get("loss", 0.0)

    def log(self, state: TrainState, learning_rate: float, grad_norm: float) -> float:
        """Write what happened since the last call. Returns the seconds that a step took."""
        values = {"step": state.step, **self._window.averages(self._loss_weights)}
        now = self._activity.accounted()
        spent = {name: now[name] - self._before[name] for name in ("data", "step", "log")}
        seconds = sum(spent.values())  # evaluations and checkpoints are none of the steps'
        steps = state.step - self._window_state.step
        values |= {
            "learning_rate": learning_rate,
            "num_skipped_steps": state.num_skipped_steps,
            "num_tokens": state.num_tokens,
            "tokens_per_second": (state.num_tokens - self._window_state.num_tokens) / seconds,
            "step_seconds": seconds / steps,
            "data_wait_fraction": spent["data"] / seconds,
        }
        if math.isfinite(grad_norm):
            values["grad_norm"] = grad_norm
        if self.peak_flops:
            values["mfu"] = self._flops / seconds / (self.peak_flops * self.world.size)
        self.last_train = values
        scalars = {tag: values[name] for name, tag in TAGS.items() if name in values}
        self._write({"kind": "train", **values, "rows_digest": state.rows_digest}, scalars)
        self._print(progress_line(values, self.num_steps))
        self._window.sums.zero_()
        self._flops, self._before, self._window_state = 0, now, state
        return values["step_seconds"]

    def log_evaluation(self, line: dict[str, Any]) -> None:
        """Held-out results (`trainer.learning`)."""
        scalars = {f"heldout/{name}": line[name] for name in TAGS if name in line}
        for task, lines in line["guessing"].items():
            scalars[f"guessing/{task}_loss"] = next(iter(lines.values())).loss_nats
        for task, (lowest, highest) in line["reference"].items():
            scalars |= {f"reference/{task}_lowest": lowest, f"reference/{task}_highest": highest}
        for source, values in line.get("sources", {}).items():
            losses = {name: values[name] for name in values if name.endswith("_loss")}
            scalars |= {f"heldout_{source}/{name}": loss for name, loss in losses.items()}
        self._write({"kind": "heldout", **line}, scalars)
        self._print(evaluation_text(line))

    def _write(self, line: dict[str, Any], scalars: dict[str, float]) -> None:
        """scalars: TensorBoard's tag -> value."""
        if self._file is None or self._writer is None:
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, line["step"])
        self._writer.flush()

    def _print(self, line: str) -> None:
        if self.world.is_main:
            print(line, flush=True)


def progress_line(values: dict[str, Any], num_steps: int) -> str:
    """What a person watches, e.g. 'step 120/600  loss 6.4302 (mlm 5.7371, nsp 0.6931) ...  ETA 0:03:12'."""
    tasks = [task for task in TASKS if f"{task}_loss" in values]
    losses = ", ".join(f"{task} {values[f'{task}_loss']:.4f}" for task in tasks)
    right = " ".join(f"{task} {values[f'{task}_accuracy']:.1%}" for task in tasks)
    eta = int(values["step_seconds"] * (num_steps - values["step"]))
    parts = [
        f"step {values['step']}/{num_steps}",
        f"loss {values.get('loss', math.nan):.4f} ({losses})",
        f"right: {right}",
        f"lr {values['learning_rate']:.2e}",
        f"grad {values.get('grad_norm', math.nan):.2f}",
        f"{values['tokens_per_second']:,.0f} tokens/s",
        f"data wait {values['data_wait_fraction']:.0%}",
        f"ETA {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}",
    ]
    if "mfu" in values:
        parts.insert(6, f"MFU {values['mfu']:.1%}")
    return "  ".join(parts)


def evaluation_text(line: dict[str, Any]) -> str:
    """Losses of each task, what has been learnt so far, and the losses of each source."""
    losses = "  ".join(losses_text(line))
    said = [
        f"held out at step {line['step']}: loss {line.get('loss', math.nan):.4f}  {losses}",
        f"  so far: {sentence(readings_of(line))}",
    ]
    for source, values in line.get("sources", {}).items():
        said.append(f"  of {source}: {'  '.join(losses_text(values))}")
    return "\n".join(said)


def thermometer_charts(tasks: tuple[str, ...]) -> dict[str, list[Any]]:
    """Of TensorBoard's custom scalars: every task's held-out loss beside guessing and our own runs."""
    return {
        task: [
            "Multiline",
            [
                f"heldout/{task}_loss", f"guessing/{task}_loss",
                f"reference/{task}_lowest", f"reference/{task}_highest",
            ],
        ]
        for task in tasks
    }  # fmt: skip


def forget_after(path: Path, step: int) -> None:
    """Drop lines of steps after `step`: a killed job had logged them, and they are about to come again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            keep = line.endswith("\n") and json.loads(line)["step"] <= step
        except ValueError:  # the last line of a killed job may be cut
            keep = False
        if keep:
            kept.append(line)
    write_atomically(path, "".join(kept))
