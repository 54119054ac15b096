"""Queries, keys and values of packed sequences in, attended values out; no sequence sees another.

Within its sequence a slot sees all, or what `visible` says: causal, or causal after a prefix.

The encoder works on flat slots, T of them; `model.layout` says which slot of the batch each one is, and
what belongs together. One interface, several backends with the same result:

    grouped   sequences of like length together, without padding between them (CPUs)
    short_rows    each row of at most 128 slots in one piece (model.short_rows; GPUs)
    varlen    FlashAttention over the flat slots, in torch itself (GPUs)
    flash     the same of the package flash-attn (GPUs)
    flex      torch.nn.attention.flex_attention with a block mask (no dropout)
    sdpa      PyTorch's fused kernels with a mask of rows x rows
    eager     softmax(Q K^T / sqrt(K)) V written out (Vaswani et al. 2017, equation 1): the twin of all
"""

# B rows, L slots of a row, T flat slots, H heads, K features of a head,
# N sequences of a group, G slots of each of them

import functools
import math
from typing import Any, cast

import torch
import torch.nn.functional as F

from model.dropout import drop_out
from model.layout import Flex, Grouped, Rows, Segments, ShortRows, Varlen, Window
from model.rotary import Rotations, rotate


def attend_projected(
    qkv_T3HK: torch.Tensor,
    segments: Segments,
    by: Rotations | None,
    *,
    window: Window,
    dropout: float,
) -> torch.Tensor:
    """`attend` with queries, keys and values as one projection gives them. [T, H * K].

    by: what queries and keys are turned by; None: they are not.
    """
    if isinstance(segments, ShortRows):
        from model.short_rows import attend_short_rows

        return attend_short_rows(
            qkv_T3HK, segments.sequence_ids, segments.visible, by, window=window, dropout=dropout
        )
    query_THK, key_THK, value_THK = qkv_T3HK.unbind(1)
    if by is not None:
        query_THK, key_THK = rotate(query_THK, by), rotate(key_THK, by)
    return attend(query_THK, key_THK, value_THK, segments, window=window, dropout=dropout)


def attend(
    query_THK: torch.Tensor,
    key_THK: torch.Tensor,
    value_THK: torch.Tensor,
    segments: Grouped | Rows | Varlen | Flex,
    *,
    window: Window,
    dropout: float,
) -> torch.Tensor:
    """Attention with probabilities dropped out at rate `dropout` (0 in evaluation). [T, H * K].

    segments: of `model.layout.lay_out`, with `window` among its windows.
    """
    if isinstance(segments, Grouped):
        return _attend_grouped(query_THK, key_THK, value_THK, segments, window, dropout)
    if isinstance(segments, Varlen):
        return _attend_varlen(query_THK, key_THK, value_THK, segments, window, dropout)
    query, key, value = (
        tensor.unflatten(0, segments.shape).transpose(1, 2)
        for tensor in (query_THK, key_THK, value_THK)
    )
    if isinstance(segments, Flex):
        flex = _flex_attention(query.device.type)
        attended_BHLK = flex(query, key, value, block_mask=segments.block_masks[window])
    elif segments.is_fused:
        attended_BHLK = F.scaled_dot_product_attention(
            query, key, value, attn_mask=segments.masks[window], dropout_p=dropout
        )
    else:
        attended_BHLK = attend_eager(query, key, value, segments.masks[window], dropout)
    return attended_BHLK.transpose(1, 2).flatten(0, 1).flatten(1)


def attend_eager(
    query_BHLK: torch.Tensor,
    key_BHLK: torch.Tensor,
    value_BHLK: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """The equation, written out. mask: to add to the scores [B, H, L, L]. [B, H, L, K]."""
    query, key, value = (x.flatten(0, 1) for x in (query_BHLK, key_BHLK, value_BHLK))
    scores = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2))
    scores_BHLL = scores.view(*query_BHLK.shape[:3], -1)
    if mask is not None:
        scores_BHLL = scores_BHLL.add_(mask)
    probabilities_BHLL = drop_out(scores_BHLL.softmax(dim=-1), dropout)
    return torch.bmm(probabilities_BHLL.flatten(0, 1), value).view(query_BHLK.shape)


@functools.cache
def _flex_attention(device_type: str) -> Any:
    """Only compiled it is fused; on CPUs its tests compare the mathematics."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device_type == "cpu" else torch.compile(flex_attention, dynamic=False)


def _attend_varlen(
    query_THK: torch.Tensor,
    key_THK: torch.Tensor,
    value_THK: torch.Tensor,
    segments: Varlen,
    window: Window,
    dropout: float,
) -> torch.Tensor:
    sides = (-1, -1) if window is None else (window, window)
    starts, longest = segments.starts, segments.longest
    if segments.is_flash:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        attended = flash_attn_varlen_func(
            query_THK, key_THK, value_THK, starts, starts, longest, longest,
            dropout_p=dropout, window_size=sides,
        )  # fmt: skip
    else:
        # What torch.nn.attention.varlen calls, which knows no dropout.
        attended, *_ = torch.ops.aten._flash_attention_forward(
            query_THK, key_THK, value_THK, starts, starts, longest, longest, dropout,
            False, False, window_size_left=sides[0], window_size_right=sides[1],
        )  # fmt: skip
    return cast(torch.Tensor, attended).flatten(1)


def _attend_grouped(
    query_THK: torch.Tensor,
    key_THK: torch.Tensor,
    value_THK: torch.Tensor,
    segments: Grouped,
    window: Window,
    dropout: float,
) -> torch.Tensor:
    attended = []
    # Split, not sliced: the backward pass of each slice would fill and add a tensor of all slots.
    sizes = [group.num_sequences * group.length for group in segments.groups]
    parts = (tensor.split(sizes) for tensor in (query_THK, key_THK, value_THK))
    for (number, length, masks), *part in zip(segments.groups, *parts, strict=True):
        query, key, value = (
            tensor.unflatten(0, (number, length)).transpose(1, 2) for tensor in part
        )
        if window is not None and window not in masks:
            padding = masks[None]
            attended_NHGK = attend_blocks(
                query, key, value, padding, window=window, dropout=dropout
            )
        else:
            attended_NHGK = attend_eager(query, key, value, masks[window], dropout)
        attended.append(attended_NHGK.transpose(1, 2).flatten(2).flatten(0, 1))
    if not attended:
        return query_THK.flatten(1)
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def attend_blocks(
    query_NHGK: torch.Tensor,
    key_NHGK: torch.Tensor,
    value_NHGK: torch.Tensor,
    padding_mask: torch.Tensor | None,
    *,
    window: int,
    dropout: float,
) -> torch.Tensor:
    """Local attention in blocks of 2 * window queries: scores of G x 4 * window instead of G x G.

    padding_mask: [N, 1, 1, G], -inf at keys that are none; None: every key is one. [N, H, G, K].
    """
    length, features = query_NHGK.shape[2:]
    block = 2 * window
    num_blocks = -(-length // block)
    fill = num_blocks * block - length
    # A block sees the keys of its own slots, and of `window` slots to each side.
    ends = (0, 0, window, window + fill)
    keys, values = (
        F.pad(tensor, ends).unfold(2, block + 2 * window, block)
        for tensor in (key_NHGK, value_NHGK)
    )  # [N, H, blocks, K, 4 * window]
    queries = F.pad(query_NHGK, (0, 0, 0, fill)).unflatten(2, (num_blocks, block))
    place = torch.arange(block + 2 * window, device=query_NHGK.device) - window
    near = (place[None, :] - torch.arange(block, device=place.device)[:, None]).abs() <= window
    slot = place + block * torch.arange(num_blocks, device=place.device)[:, None]
    exists = (slot >= 0) & (slot < length)
    # Queries that only fill the last block see all there is, so that none of them sees nothing.
    is_fill = (
        torch.arange(num_blocks * block, device=place.device).view(num_blocks, block, 1) >= length
    )
    allowed = (near & exists[:, None, :]) | (is_fill & exists[:, None, :])
    mask = torch.zeros(allowed.shape, dtype=query_NHGK.dtype, device=place.device)
    mask = mask.masked_fill_(~allowed, -math.inf)
    if padding_mask is not None:
        padded = F.pad(padding_mask[:, 0, 0], (window, window + fill)).unfold(
            1, block + 2 * window, block
        )
        # A padded query keeps the keys that it had: its result is not used, but must be finite.
        mask = torch.where(
            _has_key(mask + padded[:, :, None, :]), mask + padded[:, :, None, :], mask
        )
    else:
        mask = mask[None]
    scores = (queries * features**-0.5) @ keys  # [N, H, blocks, block, 4 * window]
    probabilities = drop_out((scores + mask[:, None]).softmax(-1), dropout)
    attended = probabilities @ values.transpose(-1, -2)
    return attended.flatten(2, 3)[:, :, :length]


def _has_key(mask: torch.Tensor) -> torch.Tensor:
    return (mask == 0).any(-1, keepdim=True)
