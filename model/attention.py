"""Queries, keys and values of packed rows in, attended values out; no sequence sees another.

Two backends with the same result: "sdpa" calls PyTorch's fused kernels, "eager" writes out
softmax(Q K^T / sqrt(K)) V (Vaswani et al. 2017, equation 1). In training on CPUs "eager" is the
faster one.
"""

# B rows, L slots of a row, H heads, K features of a head

import math
from typing import Literal

import torch
import torch.nn.functional as F

from model.dropout import drop_out

Backend = Literal["sdpa", "eager"]


def sequence_mask(sequence_ids_BL: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What to add to attention scores: 0 within a sequence, -inf across. [B, 1, L, L] of `dtype`.

    sequence_ids_BL: any integers; equal ids in a row are one sequence. The padding of a row (all
    -1) thereby is a sequence of its own: it attends to itself, nothing else attends to it, and no
    slot has -inf only.
    """
    same_BLL = sequence_ids_BL[:, :, None] == sequence_ids_BL[:, None, :]
    mask_BLL = torch.zeros(same_BLL.shape, dtype=dtype, device=same_BLL.device)
    return mask_BLL.masked_fill_(~same_BLL, -math.inf).unsqueeze(1)


def attend(
    query_BHLK: torch.Tensor,
    key_BHLK: torch.Tensor,
    value_BHLK: torch.Tensor,
    mask_B1LL: torch.Tensor,
    *,
    dropout: float,
    backend: Backend,
) -> torch.Tensor:
    """Attention with probabilities dropped out at rate `dropout` (0 in evaluation). [B, H, L, K].

    mask_B1LL: of `sequence_mask`, in the dtype of the queries.
    """
    if backend == "sdpa":
        return F.scaled_dot_product_attention(
            query_BHLK, key_BHLK, value_BHLK, attn_mask=mask_B1LL, dropout_p=dropout
        )
    return attend_eager(query_BHLK, key_BHLK, value_BHLK, mask_B1LL, dropout=dropout)


def attend_eager(
    query_BHLK: torch.Tensor,
    key_BHLK: torch.Tensor,
    value_BHLK: torch.Tensor,
    mask_B1LL: torch.Tensor,
    *,
    dropout: float,
) -> torch.Tensor:
    """The obvious twin of the fused kernels."""
    query, key, value = (x.flatten(0, 1) for x in (query_BHLK, key_BHLK, value_BHLK))
    scores = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2))
    scores_BHLL = scores.view(*query_BHLK.shape[:3], -1).add_(mask_B1LL)
    probabilities_BHLL = drop_out(scores_BHLL.softmax(dim=-1), dropout)
    return torch.bmm(probabilities_BHLL.flatten(0, 1), value).view(query_BHLK.shape)
