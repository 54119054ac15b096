"""A run's preset and a step in, the settings of that step out: what a phase changes, and until when."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from data.lanes import DataConfig

if TYPE_CHECKING:
    from trainer.config import RunConfig


@dataclass(frozen=True)
class PhaseConfig:
    """What is different from `first_step` on. None: as before."""

    first_step: int
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    sequence_length: int | None = None
    masked_fraction: float | None = None
    weights: dict[str, int] | None = None

    def __post_init__(self) -> None:
        if self.first_step < 1:
            raise ValueError(
                f"phases: first_step {self.first_step} is below 1: the settings before the first phase "
                "are the preset's own"
            )


class Settings(NamedTuple):
    """Of one step. Equal for all steps of a phase."""

    data: DataConfig
    global_batch_size: int
    micro_batch_size: int


def settings_at(run: "RunConfig", step: int) -> Settings:
    """The settings of the step after `step` completed ones. ValueError: what a phase asks for is refused."""
    settings = Settings(run.data, run.global_batch_size, run.micro_batch_size)
    for phase in run.phases:
        if phase.first_step > step:
            break
        changed = {
            name: getattr(phase, name)
            for name in ("sequence_length", "masked_fraction", "weights")
            if getattr(phase, name) is not None
        }
        settings = Settings(
            replace(settings.data, **changed),
            phase.global_batch_size or settings.global_batch_size,
            phase.micro_batch_size or settings.micro_batch_size,
        )
    return settings


def phase_end(run: "RunConfig", step: int) -> int:
    """The first step after `step` that has other settings, or the end of the run."""
    return min((p.first_step for p in run.phases if p.first_step > step), default=run.steps)
