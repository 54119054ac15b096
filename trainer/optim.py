"""Model parameters and a step number in, the optimizer and its learning rate out.

The learning rate is a pure function of the step, so a resumed run needs no scheduler state.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trainer.lamb import Lamb
from trainer.muon import Muon
from trainer.partitions import EMA, average_weights

Rule = Literal["adamw", "lamb", "muon"]
MOMENTS: dict[Rule, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lamb": ("exp_avg", "exp_avg_sq"),
    "muon": ("momentum_buffer",),
}


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


def rule_of(name: str, shape: torch.Size, optim: OptimConfig) -> Rule:
    """How a parameter is updated: LAMB takes all matrices, Muon those of layers, AdamW what is left."""
    is_matrix = len(shape) >= 2
    if optim.name == "lamb" and is_matrix:
        return "lamb"
    return "muon" if optim.name == "muon" and is_matrix and name.startswith("layers.") else "adamw"


def state_of(name: str, shape: torch.Size, optim: OptimConfig) -> tuple[str, ...]:
    """What the optimizer keeps of a parameter, beside its master weights."""
    average = () if optim.ema_decay is None else (EMA,)
    return (*MOMENTS[rule_of(name, shape, optim)], *average)


def state_numel(shapes: Mapping[str, torch.Size], optim: OptimConfig) -> int:
    """How many numbers the optimizer keeps of parameters of these shapes, beside their masters."""
    return sum(shape.numel() * len(state_of(name, shape, optim)) for name, shape in shapes.items())


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], optim: OptimConfig
) -> list[dict[str, Any]]:
    """Matrices decay, vectors (biases, LayerNorm) do not; parameters of one rule go together.

    Each group names its parameters, and the optimizer's state of each ("moments"): what ZeRO makes of
    `params` tells neither.
    """
    groups: dict[tuple[Rule, bool], dict[str, Any]] = {}
    for name, parameter in named:
        # ZeRO-3 leaves an empty vector behind
        shape = getattr(parameter, "ds_shape", parameter.shape)
        rule, decays = rule_of(name, shape, optim), len(shape) >= 2
        group = groups.setdefault(
            (rule, decays),
            {
                "params": [],
                "names": [],
                "moments": state_of(name, shape, optim),
                "rule": rule,
                "weight_decay": optim.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(
    model: torch.nn.Module, optim: OptimConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The optimizer, before ZeRO divides its tensors. dtype: what the model computes in.

    AdamW on the fused kernel: as fast as DeepSpeed's own CPU and GPU ones, with nothing to compile.
    """
    common = {
        "lr": optim.learning_rate,
        "betas": (optim.beta1, optim.beta2),
        "eps": optim.eps,
        "momentum": optim.momentum,
    }
    groups = [group | common for group in parameter_groups(model.named_parameters(), optim)]
    if optim.name == "lamb":
        optimizer: torch.optim.Optimizer = Lamb(groups)
    elif optim.name == "muon":
        optimizer = Muon(groups, dtype)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True)
    if optim.ema_decay is not None:
        average_weights(optimizer, optim.ema_decay)
    return optimizer
