"""A model's shape and a step's counts in, floating point operations and parameters out.

A multiplication and an addition are two operations; the backward pass costs twice the forward pass;
what is computed again under activation checkpointing is not counted (Chowdhery et al. 2022,
appendix B: model FLOPs). Only matrix products count: no look-ups, LayerNorm, softmax or optimizer.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from model.config import ModelConfig
from model.tasks import OF_VOCABULARY, TASKS
from model.weights import parameter_shapes

# Dense bf16 peak in FLOP/s of the vendors' data sheets, by torch.cuda.get_device_name(). GPUs
# without bf16 matrix units (V100, T4) are not here.
PEAK_BF16_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H800": 989.4e12,
    "NVIDIA H20": 148e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A800-SXM4-80GB": 312e12,
    "NVIDIA A800 80GB PCIe": 312e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s; None where unknown, as for CPUs and MIG slices."""
    return PEAK_BF16_FLOPS.get(device_name)


class Encoded(NamedTuple):
    """Rows that an encoder reads."""

    num_tokens: int  # without padding
    num_attended: Mapping[int | None, int]  # as in `flops_per_step`


def flops_per_step(
    config: ModelConfig,
    vocab_size: int,
    *,
    num_tokens: int,
    num_attended: Mapping[int | None, int],
    num_labels: Mapping[str, int],
    again: Mapping[str, Encoded] | None = None,
) -> int:
    """Operations that the forward and backward pass of these rows need, however they are computed.

    num_tokens: without padding
    num_attended: for each of `config.windows`, pairs of tokens that attend to each other (`attended_pairs`)
    num_labels: of each task
    again: what of these rows is read twice: "rtd" by the generator, "contrastive" for its second view

    The similarities of sequences with each other are left out: they are few.
    """
    again = again or {}
    multiply_adds = _encoder(config, Encoded(num_tokens, num_attended))
    if "contrastive" in again:
        multiply_adds += _encoder(config, again["contrastive"])
    if "rtd" in again:
        narrow = config.generator()
        multiply_adds += _encoder(narrow, again["rtd"])
        multiply_adds += config.hidden_size * narrow.hidden_size * again["rtd"].num_tokens
    for task, number in num_labels.items():
        multiply_adds += number * _head(config, vocab_size, task)
    return 6 * multiply_adds


def _encoder(config: ModelConfig, rows: Encoded) -> int:
    hidden = config.hidden_size
    num_products = 3 if config.architecture == "modernbert" else 2  # of the feed-forward unit
    layer_weights = 4 * hidden**2 + num_products * hidden * config.intermediate_size
    windows = map(config.window_of_layer, range(config.num_hidden_layers))
    return config.num_hidden_layers * layer_weights * rows.num_tokens + 2 * hidden * sum(
        rows.num_attended[window] for window in windows
    )


def _head(config: ModelConfig, vocab_size: int, task: str) -> int:
    """Multiply-adds of one label."""
    hidden, kind = config.hidden_size, TASKS[task]
    if task == "rtd_generator":
        return hidden * config.generator().hidden_size + hidden * vocab_size
    if task == "rtd":
        return hidden**2 + hidden
    if task == "contrastive":
        return 2 * hidden**2  # both views
    if task == "cpc":
        return hidden**2
    if kind.num_classes == OF_VOCABULARY:
        return hidden**2 + hidden * vocab_size
    return kind.index_width * hidden**2 + kind.num_classes * hidden


def attended_pairs(sequence_lengths: np.ndarray, window: int | None) -> int:
    """Pairs (query, key) within sequences, at most `window` tokens apart where there is one.

    sequence_lengths: int64 [number of sequences], in tokens.
    """
    lengths = sequence_lengths.astype(np.int64)
    squares = int((lengths**2).sum())
    if window is None:
        return squares
    too_far = np.maximum(lengths - 1 - window, 0)  # of the first token; one less for each next
    return squares - int((too_far * (too_far + 1)).sum())


def num_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Trained numbers, all heads included; the tied output embeddings count once."""
    return sum(shape.numel() for shape in parameter_shapes(config, vocab_size).values())
