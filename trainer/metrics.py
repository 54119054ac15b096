"""Losses and counts of steps in; a line to read, a line of metrics.jsonl and TensorBoard scalars out."""

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from model.heads import Losses
from trainer.evaluation import averages, stack
from trainer.files import write_atomically
from trainer.state import TrainState
from trainer.world import World

LEARNED = ("loss", "mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy")
# TensorBoard tag of each logged value. What a person looks for comes first.
TAGS = {
    "loss": "train/loss",
    "mlm_loss": "train/mlm_loss",
    "nsp_loss": "train/nsp_loss",
    "mlm_accuracy": "train/mlm_accuracy",
    "nsp_accuracy": "train/nsp_accuracy",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "num_tokens": "train/tokens",
    "tokens_per_second": "train/tokens_per_second",
    "step_seconds": "train/step_seconds",
    "data_wait_fraction": "train/data_wait_fraction",
    "mfu": "train/mfu",
}


class Metrics:
    """Collects over a window of steps; `log` is the one place where training waits for the device."""

    def __init__(
        self,
        run_dir: Path,
        world: World,
        start: TrainState,
        *,
        num_steps: int,
        peak_flops: float | None,
    ) -> None:
        self.world, self.num_steps, self.peak_flops = world, num_steps, peak_flops
        self._totals = torch.zeros(len(Losses._fields), dtype=torch.float64, device=world.device)
        self._data_wait_seconds, self._flops = 0.0, 0
        self._window_start, self._window_state = time.perf_counter(), start
        self._file = self._writer = None
        if world.is_main:
            forget_after(run_dir / "metrics.jsonl", start.step)
            self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start.step + 1)

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

    def add(self, losses: Losses) -> None:
        """One micro-batch of this rank; stays on the device."""
        self._totals += stack(losses)

    def add_step(self, *, data_wait_seconds: float, flops: int) -> None:
        """Once per optimizer step. flops: of the whole step, over all ranks."""
        self._data_wait_seconds += data_wait_seconds
        self._flops += flops

    def log(self, state: TrainState, learning_rate: float, grad_norm: float) -> dict[str, Any]:
        """Write what happened since the last call. Collective. ValueError when the loss is not finite."""
        totals = self._totals.clone()
        if self.world.size > 1:
            dist.all_reduce(totals)
        values = {"step": state.step, **averages(totals)}
        if not math.isfinite(values["loss"]):
            raise ValueError(
                f"the loss is {values['loss']} at step {state.step} (gradient norm {grad_norm}): "
                "training stops, and nothing is saved of it. Lower optim.learning_rate or raise "
                "optim.warmup_steps; the same command goes on from the last checkpoint."
            )
        seconds = time.perf_counter() - self._window_start
        steps = state.step - self._window_state.step
        values |= {
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "num_tokens": state.num_tokens,
            "tokens_per_second": (state.num_tokens - self._window_state.num_tokens) / seconds,
            "step_seconds": seconds / steps,
            "data_wait_fraction": self._data_wait_seconds / seconds,
        }
        if self.peak_flops:
            values["mfu"] = self._flops / seconds / (self.peak_flops * self.world.size)
        self._write({"kind": "train", **values, "rows_digest": state.rows_digest}, TAGS)
        self._print(progress_line(values, self.num_steps))
        self._totals.zero_()
        self._data_wait_seconds, self._flops = 0.0, 0
        self._window_start, self._window_state = time.perf_counter(), state
        return values

    def log_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Held-out results. The time they took is not counted against the steps."""
        self._write(
            {"kind": "heldout", "step": step, **values},
            {name: f"heldout/{name}" for name in values},
        )
        shown = dict.fromkeys(LEARNED, math.nan) | values
        self._print(
            f"held out at step {step}: loss {shown['loss']:.4f}"
            f"  mlm {shown['mlm_loss']:.4f} ({shown['mlm_accuracy']:.1%} right)"
            f"  nsp {shown['nsp_loss']:.4f} ({shown['nsp_accuracy']:.1%} right)"
        )

    def pause(self) -> float:
        """Start of something that is no training; give the returned value to `resume`."""
        return time.perf_counter()

    def resume(self, paused_at: float) -> None:
        self._window_start += time.perf_counter() - paused_at

    def _write(self, values: dict[str, Any], tags: dict[str, str]) -> None:
        if self._file is None or self._writer is None:
            return
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        for name, tag in tags.items():
            if name in values:
                self._writer.add_scalar(tag, values[name], values["step"])
        self._writer.flush()

    def _print(self, line: str) -> None:
        if self.world.is_main:
            print(line, flush=True)


def progress_line(values: dict[str, Any], num_steps: int) -> str:
    """What a person watches, e.g. 'step 120/600  loss 6.4302 (mlm 5.7371, nsp 0.6931) ...  ETA 0:03:12'."""
    shown = dict.fromkeys(LEARNED, math.nan) | values
    eta = int(values["step_seconds"] * (num_steps - values["step"]))
    parts = [
        f"step {values['step']}/{num_steps}",
        f"loss {shown['loss']:.4f} (mlm {shown['mlm_loss']:.4f}, nsp {shown['nsp_loss']:.4f})",
        f"right: mlm {shown['mlm_accuracy']:.1%} nsp {shown['nsp_accuracy']:.1%}",
        f"lr {values['learning_rate']:.2e}",
        f"grad {values['grad_norm']:.2f}",
        f"{values['tokens_per_second']:,.0f} tokens/s",
        f"data wait {values['data_wait_fraction']:.0%}",
        f"ETA {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}",
    ]
    if "mfu" in values:
        parts.insert(6, f"MFU {values['mfu']:.1%}")
    return "  ".join(parts)


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
