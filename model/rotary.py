"""Positions in, queries and keys that are turned by them out: rotary embeddings (Su et al. 2021)."""

# T flat slots, H heads, K features of a head

from typing import NamedTuple

import torch


class Rotations(NamedTuple):
    """Of each slot's features: fp32 [T, 1, K], the two halves of K alike (Su et al. 2021)."""

    cosine: torch.Tensor
    sine: torch.Tensor


def rotations(position_ids_T: torch.Tensor, head_size: int, theta: float) -> Rotations:
    """position_ids_T: int64 [T]. Feature pair k of position p turns by p / theta^(2k / K)."""
    even = torch.arange(0, head_size, 2, device=position_ids_T.device, dtype=torch.int64).float()
    frequencies = 1.0 / theta ** (even / head_size)
    angles_TK = (position_ids_T[:, None].float() * frequencies).repeat(1, 2)[:, None, :]
    return Rotations(angles_TK.cos(), angles_TK.sin())


def rotate(values_THK: torch.Tensor, by: Rotations) -> torch.Tensor:
    """In fp32, and back in the dtype of the values."""
    values = values_THK.float()
    first, second = values.chunk(2, dim=-1)
    turned = values * by.cosine + torch.cat([-second, first], dim=-1) * by.sine
    return turned.to(values_THK.dtype)
