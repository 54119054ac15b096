"""LAMB, Muon and AdamW as their papers have them, one whole tensor at a time: what ours must agree with."""

import math
from collections.abc import Mapping

import torch

from trainer.optim_config import OptimConfig

Tensors = dict[str, torch.Tensor]


class Reference:
    """Masters and state of every tensor, fused weights taken apart; steps on gradients by name."""

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        optim: OptimConfig,
        stacked: Mapping[str, int],
        dtype: torch.dtype,
    ) -> None:
        self.optim, self.stacked, self.dtype = optim, stacked, dtype
        self.weights = self._apart(weights)
        self.average = {name: value.clone() for name, value in self.weights.items()}
        self.first = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.steps = 0

    def step(self, gradients: Mapping[str, torch.Tensor], learning_rate: float) -> None:
        """gradients: as the model has them, not clipped."""
        self.steps += 1
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        clip = min(1.0, self.optim.clip_norm / (norm + 1e-6))
        for name, gradient in self._apart(gradients).items():
            self._update(name, gradient * clip, learning_rate)
        if self.optim.ema_decay is not None:
            decay = self.optim.ema_decay
            for name, value in self.weights.items():
                self.average[name] = decay * self.average[name] + (1 - decay) * value

    def whole(self, parts: Tensors) -> Tensors:
        """Tensors by the model's own names, fused again."""
        found: dict[str, list[torch.Tensor]] = {}
        for name, value in parts.items():
            found.setdefault(name.partition("#")[0], []).append(value)
        return {name: torch.cat(values) for name, values in found.items()}

    def _apart(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        found = {}
        for name, value in tensors.items():
            number = next((n for end, n in self.stacked.items() if name.endswith(end)), 1)
            for i, part in enumerate(value.float().chunk(number)):
                found[f"{name}#{i}"] = part.clone()
        return found

    def _update(self, name: str, gradient: torch.Tensor, learning_rate: float) -> None:
        optim, weight = self.optim, self.weights[name]
        decay = optim.weight_decay if weight.ndim == 2 else 0.0
        if optim.name == "muon" and weight.ndim == 2 and name.startswith("layers."):
            buffer = self.first[name] = optim.momentum * self.first[name] + gradient
            orthogonal = newton_schulz((gradient + optim.momentum * buffer).to(self.dtype))
            scale = 0.2 * math.sqrt(max(weight.shape))
            weight *= 1 - learning_rate * decay
            weight -= learning_rate * scale * orthogonal.float()
            return
        self.first[name] = optim.beta1 * self.first[name] + (1 - optim.beta1) * gradient
        self.second[name] = optim.beta2 * self.second[name] + (1 - optim.beta2) * gradient**2
        first = self.first[name] / (1 - optim.beta1**self.steps)
        second = self.second[name] / (1 - optim.beta2**self.steps)
        update = first / (second.sqrt() + optim.eps) + decay * weight
        ratio = 1.0
        if optim.name == "lamb" and weight.ndim == 2:
            ratio = weight.double().norm().item() / update.double().norm().item()
        weight -= learning_rate * ratio * update


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Jordan et al. 2024, in the dtype of the matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
