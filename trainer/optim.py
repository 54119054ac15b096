"""Model parameters and a step number in, the optimizer and its learning rate out.

The learning rate is a pure function of the step, so a resumed run needs no scheduler state.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019) with warm-up and decay."""

    learning_rate: float = 1e-4  # at the end of warm-up
    warmup_steps: int = 0
    schedule: Literal["linear", "cosine"] = "linear"
    final_fraction: float = 0.0  # of learning_rate, at the last step
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6  # as in BERT's own code; torch's default is 1e-8
    weight_decay: float = 0.01  # not on biases and LayerNorm (Devlin et al. 2019, appendix A.2)
    clip_norm: float = 1.0  # of the global gradient; 0 leaves it as it is

    def __post_init__(self) -> None:
        problems = [
            f"optim.{name} {value} is negative"
            for name, value in vars(self).items()
            if isinstance(value, int | float) and value < 0
        ]
        if self.learning_rate == 0:
            problems.append("optim.learning_rate is 0: nothing would be learned")
        if not (self.beta1 < 1 and self.beta2 < 1):
            problems.append(f"optim.beta1 {self.beta1} and beta2 {self.beta2} must be below 1")
        if self.final_fraction > 1:
            problems.append(f"optim.final_fraction {self.final_fraction} is above 1")
        if problems:
            raise ValueError("; ".join(problems))


def lr_at(step: int, optim: OptimConfig, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then linear or cosine decay.

    The first step already moves (1 / warmup_steps of the peak); the last has about final_fraction
    of it.
    """
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    progress = min(1.0, (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps))
    left = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return optim.learning_rate * (optim.final_fraction + (1 - optim.final_fraction) * left)


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Matrices decay, vectors (biases, LayerNorm) do not.

    Each group names its parameters and the optimizer's state of each ("moments"): what ZeRO makes of
    `params` tells neither.
    """
    decay: dict[str, torch.nn.Parameter] = {}
    no_decay: dict[str, torch.nn.Parameter] = {}
    for name, parameter in named:
        shape = getattr(
            parameter, "ds_shape", parameter.shape
        )  # ZeRO-3 leaves an empty vector behind
        (decay if len(shape) >= 2 else no_decay)[name] = parameter
    return [
        {
            "params": list(members.values()),
            "names": tuple(members),
            "moments": ADAM_MOMENTS,
            "weight_decay": decayed_by,
        }
        for members, decayed_by in ((decay, weight_decay), (no_decay, 0.0))
    ]


def build_optimizer(model: torch.nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW on the fused kernel: as fast as DeepSpeed's own CPU and GPU ones, with nothing to compile."""
    groups = parameter_groups(model.named_parameters(), optim.weight_decay)
    return torch.optim.AdamW(
        groups, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
    )
