"""Two runs' folders in, how much they differ out: every step's numbers and the final weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.proof_runs import read_curve
from trainer.checkpoint_files import list_checkpoints
from trainer.saved_tensors import SavedTensors

EXACT = ("rows_digest", "num_tokens", "learning_rate")  # equal on any number of processes
ROUNDED = ("loss", "grad_norm")  # but for rounding
FIELDS = (*EXACT, *ROUNDED)


@dataclass(frozen=True)
class Difference:
    """Between an unbroken run and one that was killed and resumed. 0 is bit for bit."""

    num_steps: int
    largest: dict[str, float]  # of each of FIELDS and "weights", relative
    first: str | None  # in words; None: there is none

    def problem(self, bound: float | None) -> str | None:
        """What breaks the promise. bound: of the losses, relative; None: everything is to be equal."""
        if bound is None:
            return self.first
        wrong = [name for name in EXACT if self.largest[name]]
        if wrong:
            return f"{', '.join(wrong)} differ: {self.first}"
        if not self.largest["loss"] <= bound:
            return f"the loss differs by {self.largest['loss']:.2g}, over {bound:g}: {self.first}"
        return None


def compare(unbroken: Path, resumed: Path) -> Difference:
    ours, theirs = read_curve(unbroken), read_curve(resumed)
    largest = dict.fromkeys(FIELDS, 0.0)
    first = None
    if ours.keys() != theirs.keys():
        missing = sorted(ours.keys() ^ theirs.keys())
        first = f"steps {missing[:5]} are told by one of the two runs only"
        largest = dict.fromkeys(FIELDS, float("inf"))
    for step in sorted(ours.keys() & theirs.keys()):
        for name in FIELDS:
            difference = _relative(ours[step].get(name), theirs[step].get(name))
            largest[name] = max(largest[name], difference)
            if difference and first is None:
                first = f"{name} of step {step} is {_exactly(ours[step].get(name))} in the unbroken run and "
                first += f"{_exactly(theirs[step].get(name))} in the resumed one"
    weights, tensor = compare_checkpoints(
        list_checkpoints(unbroken)[-1], list_checkpoints(resumed)[-1]
    )
    if tensor and first is None:
        first = f"the curves are equal; of the final checkpoint {tensor} differs"
    return Difference(len(ours), {**largest, "weights": weights}, first)


def compare_checkpoints(first: Path, second: Path) -> tuple[float, str | None]:
    """(largest difference of a weight or moment relative to its tensor's largest, the first that differs)."""
    with SavedTensors(first) as ours, SavedTensors(second) as theirs:
        sizes = ours.sizes()
        if first.name != second.name or sizes != theirs.sizes():
            return float("inf"), f"{first.name} or {second.name}"
        largest, name = 0.0, None
        for key, size in sorted(sizes.items()):
            mine, other = ours.read(key, 0, size), theirs.read(key, 0, size)
            if torch.equal(mine, other):
                continue
            name = name or key
            scale = float(mine.abs().max()) or 1.0
            largest = max(largest, float((mine - other).abs().max()) / scale)
    return largest, name


def _relative(ours: Any, theirs: Any) -> float:
    if ours == theirs:
        return 0.0
    if ours is None or theirs is None:
        return float("inf")
    difference = abs(ours - theirs) / max(abs(ours), abs(theirs))
    return difference if difference == difference else float("inf")  # a NaN is not equal to itself


def _exactly(value: Any) -> str:
    return f"{value!r} ({value.hex()})" if isinstance(value, float) else repr(value)
