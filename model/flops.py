"""A model's shape and a step's counts in, floating point operations and parameters out.

A multiplication and an addition are two operations; the backward pass costs twice the forward pass;
what is computed again under activation checkpointing is not counted (Chowdhery et al. 2022,
appendix B: model FLOPs). Only matrix products count: no look-ups, LayerNorm, softmax or optimizer.
"""

from model.bert import ModelConfig

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


def flops_per_step(
    config: ModelConfig,
    vocab_size: int,
    *,
    num_tokens: int,
    sum_squared_lengths: int,
    num_masked: int,
    num_pairs: int,
) -> int:
    """Operations that the forward and backward pass of these rows need, however they are computed.

    num_tokens: without padding
    sum_squared_lengths: over sequences, in tokens squared: attention within sequences only
    num_masked, num_pairs: rows that go through the heads
    """
    hidden = config.hidden_size
    layer_weights = 4 * hidden**2 + 2 * hidden * config.intermediate_size
    multiply_adds = (
        config.num_hidden_layers * (layer_weights * num_tokens + 2 * hidden * sum_squared_lengths)
        + (hidden**2 + hidden * vocab_size) * num_masked
        + (hidden**2 + 2 * hidden) * num_pairs
    )
    return 6 * multiply_adds


def num_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Trained numbers, both heads included; the tied output embeddings count once."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    layer_norm = 2 * hidden
    embeddings = (
        vocab_size + config.max_position_embeddings + config.type_vocab_size
    ) * hidden + layer_norm
    attention = 4 * (hidden**2 + hidden) + layer_norm
    feed_forward = 2 * hidden * intermediate + intermediate + hidden + layer_norm
    mlm_head = hidden**2 + hidden + layer_norm + vocab_size
    nsp_head = hidden**2 + hidden + 2 * hidden + 2
    return embeddings + config.num_hidden_layers * (attention + feed_forward) + mlm_head + nsp_head
