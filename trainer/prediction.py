"""RUN/plan.json in, what was foretold of a job beside what it measures out: one event of the ledger.

`cloze plan` writes the file. Training never depends on it: one that is missing, damaged or of other settings
changes nothing but what is said.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from data.files import read_small_json
from trainer.config import RunConfig
from trainer.measured_memory import peak_bytes
from trainer.phases import settings_at
from trainer.run_folder import PLAN_FILE
from trainer.world import World

FORMAT = "cloze-plan-v1"
MEASURED_STEP = 2  # of a job: the first allocates what stays


@dataclass(frozen=True)
class Prediction:
    """Of one phase of a run, in the setting that its preset says."""

    first_step: int
    world_size: int
    zero_stage: int
    offload: bool
    precision: str
    activation_checkpointing: str
    micro_batch_size: int
    accumulation: int
    sequence_length: int
    device_type: str
    peak_bytes: int  # of a rank's device; on CPUs of all its tensors
    step_seconds: float | None

    def differences(self, setting: Mapping[str, Any]) -> list[str]:
        """'name: foretold -> here' for all in which `setting` is another."""
        mine = asdict(self)
        return [
            f"{name}: {mine[name]} -> {value}"
            for name, value in setting.items()
            if mine[name] != value
        ]


def to_json(predictions: list[Prediction]) -> dict[str, Any]:
    return {"format": FORMAT, "phases": [asdict(prediction) for prediction in predictions]}


def read_prediction(run_dir: Path, step: int) -> Prediction | str | None:
    """Of the step after `step` completed ones. None: there is no plan; a text: why it cannot be used."""
    path = run_dir / PLAN_FILE
    if not path.exists():
        return None
    try:
        document = read_small_json(path)
        if document["format"] != FORMAT:
            return f"{path} has format {document['format']!r}, not {FORMAT!r}"
        names = {field.name for field in fields(Prediction)}
        phases = [
            Prediction(**{name: values[name] for name in names}) for values in document["phases"]
        ]
        fitting = [phase for phase in phases if phase.first_step <= step]
        return fitting[-1] if fitting else f"{path} foretells nothing of step {step}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{path} cannot be read as a plan: {error!r}"


class Comparison:
    """What a job is compared with, and what it has measured so far. One of rank 0; nothing elsewhere."""

    def __init__(
        self, run: RunConfig, world: World, step: int, deepspeed: Mapping[str, Any]
    ) -> None:
        self._device, self._measured = world.device, 0
        found = read_prediction(Path(run.dir), step) if world.is_main else None
        self._problem = found if isinstance(found, str) else None
        self._prediction = found if isinstance(found, Prediction) else None
        self._at_step = step + MEASURED_STEP
        self._from_step = step + run.log_every  # the first line of a job has its warm-up in it
        if self._prediction is not None:
            differences = self._prediction.differences(_setting(run, world, step, deepspeed))
            if differences:
                self._prediction = None
                self._problem = (
                    f"{PLAN_FILE} is of another setting, and foretells nothing of this job: "
                    f"{'; '.join(differences)}. `cloze plan` with this one writes it anew"
                )

    def during(self, step: int, work: Callable[[], float]) -> float:
        """`work()`, the step that completes as `step`; its memory is measured if it is time to."""
        if self._prediction is None or step != self._at_step:
            return work()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            result = work()
            self._measured = torch.cuda.max_memory_allocated(self._device)
            return result
        results: list[float] = []
        try:
            self._measured = peak_bytes(lambda: results.append(work()))
        except Exception as error:
            if not results:
                raise  # the step's own
            self._prediction, self._problem = None, f"memory could not be measured: {error!r}"
        return results[0]

    def look(self, step: int, step_seconds: float) -> str | None:
        """What is to be said after a line of metrics; once in a job."""
        if self._problem is not None:
            said, self._problem = self._problem, None
            return said
        if self._prediction is None or step <= self._from_step or not self._measured:
            return None
        foretold, self._prediction = self._prediction, None
        parts = [
            f"memory of a rank {_beside(foretold.peak_bytes / 1e9, self._measured / 1e9, 'GB')}"
        ]
        if foretold.step_seconds is not None:
            parts.append(f"step {_beside(foretold.step_seconds, step_seconds, 's')}")
        return ", ".join(parts)


def _beside(foretold: float, measured: float, unit: str) -> str:
    return f"{foretold:.3g} {unit} foretold, {measured:.3g} {unit} measured ({foretold / measured - 1:+.1%})"


def _setting(
    run: RunConfig, world: World, step: int, deepspeed: Mapping[str, Any]
) -> dict[str, Any]:
    settings, zero = settings_at(run, step), deepspeed["zero_optimization"]
    return {
        "world_size": world.size,
        "zero_stage": zero["stage"],
        "offload": zero.get("offload_optimizer", {}).get("device", "none") != "none",
        "precision": run.precision,
        "activation_checkpointing": run.model.activation_checkpointing,
        "micro_batch_size": settings.micro_batch_size,
        "accumulation": settings.global_batch_size // (settings.micro_batch_size * world.size),
        "sequence_length": settings.data.sequence_length,
        "device_type": world.device.type,
    }
