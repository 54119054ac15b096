"""A Hugging Face folder in, a model that computes out: for measuring, not for training."""

from dataclasses import replace
from pathlib import Path

import torch

from model.config import Backend
from model.hf import import_hf, missing_weights
from model.pretraining import ForPreTraining
from model.weights import build_empty, parameter_shapes


def load_model(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    pad_token_id: int = 0,
    attention: Backend = "auto",
) -> tuple[ForPreTraining, list[str]]:
    """The model without dropout, and the names of the weights that its folder does not have: those are 0.

    ValueError as of `model.hf.import_hf`; heads alone may be absent.
    """
    weights, config, vocab_size = import_hf(folder, allow_missing_heads=True)
    config = replace(config, attention=attention)
    missing = missing_weights(weights, config, vocab_size)
    shapes = parameter_shapes(config, vocab_size)
    weights |= {name: torch.zeros(shapes[name]) for name in missing}
    model = build_empty(config, vocab_size, pad_token_id)
    model.untie()
    model.load_state_dict(weights, assign=True)  # no second copy of the weights
    model.tie()
    return model.to(device, dtype).eval().requires_grad_(False), missing
