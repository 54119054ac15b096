"""Model parameters and settings in, the optimizer out."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from trainer.lamb import Lamb
from trainer.muon import Muon
from trainer.optim_config import OptimConfig, Rule
from trainer.partitions import EMA, average_weights

MOMENTS: dict[Rule, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lamb": ("exp_avg", "exp_avg_sq"),
    "muon": ("momentum_buffer",),
}


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
