"""The optimizer's settings and a step in, its learning rate out. Imports no torch: `cloze train` reads it too.

The learning rate is a pure function of the step, so a resumed run needs no scheduler state.
"""

import math
from dataclasses import dataclass
from typing import Literal

Rule = Literal["adamw", "lamb", "muon"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019), LAMB or Muon (docs/optimizers.md), with warm-up and decay."""

    name: Rule = "adamw"
    learning_rate: float = 1e-4  # at the end of warm-up
    warmup_steps: int = 0
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    decay_steps: int = 0  # wsd's alone: of its decay at the end
    final_fraction: float = 0.0  # of learning_rate, at the last step; constant has none
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6  # as in BERT's own code; torch's default is 1e-8
    momentum: float = 0.95  # muon's alone
    weight_decay: float = 0.01  # not on biases and LayerNorm (Devlin et al. 2019, appendix A.2)
    clip_norm: float = 1.0  # of the global gradient; 0 leaves it as it is
    ema_decay: float | None = None  # of an average of the weights over the steps; None: without

    def __post_init__(self) -> None:
        problems = [
            f"optim.{name} {value} is negative"
            for name, value in vars(self).items()
            if isinstance(value, int | float) and value < 0
        ]
        if self.learning_rate == 0:
            problems.append("optim.learning_rate is 0: nothing would be learned")
        if self.eps == 0:
            problems.append(
                "optim.eps is 0: a weight that has had no gradient yet would become NaN"
            )
        if not (self.beta1 < 1 and self.beta2 < 1):
            problems.append(f"optim.beta1 {self.beta1} and beta2 {self.beta2} must be below 1")
        if self.momentum >= 1:
            problems.append(f"optim.momentum {self.momentum} must be below 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            problems.append(
                f"optim.ema_decay {self.ema_decay} is not between 0 and 1; null: no average"
            )
        problems += self._schedule_problems()
        if problems:
            raise ValueError("; ".join(problems))

    def _schedule_problems(self) -> list[str]:
        problems = []
        if self.final_fraction > 1:
            problems.append(f"optim.final_fraction {self.final_fraction} is above 1")
        if self.schedule == "constant" and self.final_fraction > 0:
            problems.append(
                f"optim.final_fraction {self.final_fraction}: schedule constant does not decay"
            )
        if self.schedule == "wsd" and self.decay_steps == 0:
            problems.append("optim.decay_steps is 0: schedule wsd decays over that many last steps")
        if self.schedule != "wsd" and self.decay_steps:
            problems.append(
                f"optim.decay_steps {self.decay_steps} is schedule wsd's alone, not {self.schedule}'s"
            )
        return problems


def lr_at(step: int, optim: OptimConfig, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then what `schedule` says.

    linear, cosine: decay from the end of warm-up to num_steps
    constant: none
    wsd: stable, then over the last decay_steps 1 - sqrt of the part of them gone (Haegele et al. 2024)

    The first step already moves (1 / warmup_steps of the peak); the last has about final_fraction
    of it.
    """
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    begin = num_steps - optim.decay_steps if optim.schedule == "wsd" else optim.warmup_steps
    progress = min(1.0, max(0.0, (step - begin) / max(1, num_steps - begin)))
    left = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "constant": 1.0,
        "wsd": 1 - math.sqrt(progress),
    }[optim.schedule]
    return optim.learning_rate * (optim.final_fraction + (1 - optim.final_fraction) * left)
