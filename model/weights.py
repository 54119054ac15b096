"""A shape and a seed in, fresh weights out, one at a time; and given weights into a model, checked by name."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

from model.config import ModelConfig
from model.pretraining import ForPreTraining

# modernbert: what leads back into the residual stream is drawn smaller, by sqrt(2 x layers).
INTO_RESIDUAL = ("attention_output.weight", ".output.weight", "transform.weight")


def build(
    config: ModelConfig, vocab_size: int, pad_token_id: int = 0, *, seed: int = 0
) -> ForPreTraining:
    """A model with fresh weights, on the default device."""
    model = build_empty(config, vocab_size, pad_token_id)
    model.to_empty(device=torch.get_default_device())
    model.tie()
    load_weights(model, dict(fresh_weights(config, vocab_size, seed=seed)))
    return model


def build_empty(config: ModelConfig, vocab_size: int, pad_token_id: int = 0) -> ForPreTraining:
    """A model on the meta device: shapes without memory, and no output weights: `tie` when it has some."""
    with torch.device("meta"):
        model = ForPreTraining(config, vocab_size, pad_token_id)
    model.untie()
    return model


def fresh_weights(
    config: ModelConfig, vocab_size: int, *, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and fp32 value of every weight, in the model's order: the same for the same seed and shape.

    BERT: matrices and embeddings normal with standard deviation initializer_range, drawn anew beyond two
    of them (0.0176 in effect for 0.02), as in the authors' own code; Hugging Face's BERT does not
    truncate, and sets the padding token's embedding to 0. LayerNorm: 1 and 0. Biases: 0. ModernBERT: the
    same, but that matrices into the residual stream have initializer_range / sqrt(2 x layers), as in its
    configuration. Only one weight exists at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, shape in parameter_shapes(config, vocab_size).items():
        if len(shape) < 2:
            yield (
                name,
                torch.full(shape, 1.0 if name.endswith("norm.weight") else 0.0, device="cpu"),
            )
            continue
        deviation = config.initializer_range
        if config.architecture == "modernbert" and name.endswith(INTO_RESIDUAL):
            deviation /= math.sqrt(2.0 * config.num_hidden_layers)
        value = torch.empty(shape, dtype=torch.float32, device="cpu")
        nn.init.trunc_normal_(value, 0.0, deviation, -2 * deviation, 2 * deviation, generator)
        yield name, value


def parameter_shapes(config: ModelConfig, vocab_size: int) -> dict[str, torch.Size]:
    """Every weight's name and shape, in the model's order; the tied decoder is not named twice."""
    model = build_empty(config, vocab_size)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def stacked_matrices(config: ModelConfig) -> dict[str, int]:
    """How many matrices lie over one another in weights whose names end so; all other weights are one."""
    gate = {"intermediate.weight": 2} if config.architecture == "modernbert" else {}
    return {"qkv.weight": 3, **gate}


def weight_problems(
    weights: Mapping[str, torch.Tensor],
    shapes: Mapping[str, torch.Size],
    *,
    may_miss: Collection[str] = (),
) -> list[str]:
    """What keeps `weights` from being those of `shapes`: missing, unknown, wrongly shaped."""
    problems = [
        f"{name} is missing" for name in shapes if name not in weights and name not in may_miss
    ]
    problems += [f"{name} is unknown" for name in weights if name not in shapes]
    return problems + [
        f"{name} has shape {list(weights[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]


def not_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """A line for each weight that holds NaN or infinite values."""
    return [
        f"{name} has {int((~torch.isfinite(value)).sum())} NaN or infinite values"
        for name, value in weights
        if not torch.isfinite(value).all()
    ]


@torch.no_grad()
def load_weights(
    model: ForPreTraining,
    weights: Mapping[str, torch.Tensor],
    *,
    may_miss: Collection[str] = (),
) -> None:
    """Copy weights, named as in `named_parameters`, into the model.

    may_miss: names that may be absent; these weights of the model stay as they are.

    ValueError, naming all of them, for missing, unknown and wrongly shaped weights; nothing is
    changed then.
    """
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    if problems := weight_problems(weights, shapes, may_miss=may_miss):
        raise ValueError("weights do not fit the model: " + "; ".join(problems))
    for name, value in weights.items():
        parameters[name].copy_(value)
