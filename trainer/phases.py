"""A run's preset and a step in, the settings of that step out: what a phase changes, and until when."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from data.lanes import DataConfig
from trainer.optim_config import OptimConfig, lr_at

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
    objectives: dict[str, int] | None = None
    loss_weights: dict[str, float] | None = None  # these change, others stay
    learning_rate: float | None = None  # a schedule of its own, from here to the next such phase
    warmup_steps: int | None = None  # of that schedule; None: 0

    def __post_init__(self) -> None:
        problems = []
        if self.first_step < 1:
            problems.append(
                f"phases: first_step {self.first_step} is below 1: the settings before the first phase "
                "are the preset's own"
            )
        for name in ("global_batch_size", "micro_batch_size"):
            if (size := getattr(self, name)) is not None and size < 1:
                problems.append(f"phases: {name} {size} is below 1")
        if self.learning_rate is not None and self.learning_rate <= 0:
            problems.append(f"phases: learning_rate {self.learning_rate} is not above 0")
        if self.warmup_steps is not None and self.learning_rate is None:
            problems.append("phases: warmup_steps needs a learning_rate to warm up to")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            problems.append(f"phases: warmup_steps {self.warmup_steps} is negative")
        if problems:
            raise ValueError("; ".join(problems))


class Settings(NamedTuple):
    """Of one step. Equal for all steps of a phase."""

    data: DataConfig
    global_batch_size: int
    micro_batch_size: int
    loss_weights: dict[str, float]  # of tasks; others have their default


def settings_at(run: "RunConfig", step: int) -> Settings:
    """The settings of the step after `step` completed ones. ValueError: what a phase asks for is refused.

    Objectives of other phases have weight 0: the model has their heads throughout.
    """
    every = [run.data.objectives, *(phase.objectives or {} for phase in run.phases)]
    no_rows = {name: 0 for objectives in every for name in objectives}
    settings = Settings(
        replace(run.data, objectives=no_rows | run.data.objectives),
        run.global_batch_size,
        run.micro_batch_size,
        run.loss_weights,
    )
    for phase in run.phases:
        if phase.first_step > step:
            break
        changed = {
            name: getattr(phase, name)
            for name in ("sequence_length", "masked_fraction", "weights")
            if getattr(phase, name) is not None
        }
        if phase.objectives is not None:
            changed["objectives"] = no_rows | phase.objectives
        settings = Settings(
            replace(settings.data, **changed),
            phase.global_batch_size or settings.global_batch_size,
            phase.micro_batch_size or settings.micro_batch_size,
            settings.loss_weights | (phase.loss_weights or {}),
        )
    return settings


def phase_end(run: "RunConfig", step: int) -> int:
    """The first step after `step` that has other settings, or the end of the run."""
    return min((p.first_step for p in run.phases if p.first_step > step), default=run.steps)


class Schedule(NamedTuple):
    """A learning rate's rise and fall: the run's only one, or one for each phase that gives a rate."""

    first_step: int
    end: int
    optim: OptimConfig  # its rate and warm-up are this schedule's


def schedules(run: "RunConfig") -> Iterator[Schedule]:
    """In order. Of `optim`, a phase changes the rate and the warm-up."""
    begun, optim = 0, run.optim
    for phase in run.phases:
        if phase.learning_rate is not None:
            yield Schedule(begun, phase.first_step, optim)
            own = {"learning_rate": phase.learning_rate, "warmup_steps": phase.warmup_steps or 0}
            begun, optim = phase.first_step, replace(run.optim, **own)
    yield Schedule(begun, run.steps, optim)


def learning_rate_at(run: "RunConfig", step: int) -> float:
    """Of the step after `step` completed ones."""
    now = next(schedule for schedule in schedules(run) if step < schedule.end)
    return lr_at(step - now.first_step, now.optim, now.end - now.first_step)
