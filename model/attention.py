"""Queries, keys and values of packed sequences in, attended values out; no sequence sees another.

The encoder works on flat slots, T of them; `lay_out` says which slot of the batch each one is, and
what belongs together. One interface, several backends with the same result:

    grouped   sequences of like length together, without padding between them (CPUs)
    varlen    torch.nn.attention.varlen: FlashAttention over the flat slots (GPUs, no dropout)
    flash     the package flash-attn, the same with dropout (GPUs)
    flex      torch.nn.attention.flex_attention with a block mask (no dropout)
    sdpa      PyTorch's fused kernels with a mask of rows x rows
    eager     softmax(Q K^T / sqrt(K)) V written out (Vaswani et al. 2017, equation 1): the twin of all
"""

# B rows, L slots of a row, T flat slots, H heads, K features of a head,
# N sequences of a group, G slots of each of them

import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from model.config import WITHOUT_DROPOUT, Backend
from model.dropout import drop_out

Window = int | None  # tokens to each side that are attended to; None: the whole sequence
HALF = (torch.bfloat16, torch.float16)
ROUND_LENGTH = 8  # grouped: lengths are rounded up to multiples of this,
SHORTEST_OF_GROUP = 0.9  # and a group holds sequences of this share of its longest, or more
BLOCKS_PAY_OFF = (
    4  # windows: local attention goes block by block where sequences are longer than this
)


def choose_backend(
    backend: Backend, device: torch.device, dropout: float, dtype: torch.dtype
) -> Backend:
    """The backend that "auto" stands for. ValueError where the one asked for cannot run here.

    dropout: of attention probabilities; dtype: of the weights.
    """
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if backend == "auto":
        if device.type == "cpu":
            return "grouped"
        if dtype not in HALF:
            return "sdpa"
        if dropout == 0:
            return "varlen"
        return "flash" if has_flash else "sdpa"
    if backend in ("varlen", "flash", "flex") and device.type != "cuda":
        raise ValueError(
            f"attention {backend!r} needs a GPU, this is {device.type}: use 'grouped' or 'auto'"
        )
    if backend == "flash" and not has_flash:
        raise ValueError("attention 'flash' needs the package flash-attn: pip install flash-attn")
    if backend in ("varlen", "flash") and dtype not in HALF:
        raise ValueError(
            f"attention {backend!r} needs precision bf16, not {dtype}: use 'sdpa' or 'auto'"
        )
    if backend in WITHOUT_DROPOUT and dropout:
        raise ValueError(
            f"attention {backend!r} cannot drop out, attention_probs_dropout_prob is {dropout}"
        )
    return backend


class Group(NamedTuple):
    """The next N * G flat slots are N sequences in G slots each."""

    num_sequences: int
    length: int
    masks: dict[
        Window, torch.Tensor | None
    ]  # to add to scores, [N or 1, 1, 1 or G, G]; None: nothing


class Grouped(NamedTuple):
    groups: tuple[Group, ...]


class Rows(NamedTuple):
    """Every row at once, with masks [B, 1, L, L] to add to scores."""

    shape: tuple[int, int]
    masks: dict[Window, torch.Tensor]
    is_fused: bool


class Varlen(NamedTuple):
    """starts: int32 [S + 1], the flat slot each sequence begins at, at last T."""

    starts: torch.Tensor
    longest: int
    is_flash: bool


class Flex(NamedTuple):
    shape: tuple[int, int]
    block_masks: dict[Window, Any]


Segments = Grouped | Rows | Varlen | Flex


class Layout(NamedTuple):
    """How a batch lies in flat slots."""

    segments: Segments
    slot_T: torch.Tensor | None  # int64, of the B * L slots the one that each flat slot shows
    place: torch.Tensor | None  # int64 [B * L], the flat slot that shows it; None: the same numbers


def lay_out(
    sequence_ids_BL: torch.Tensor,
    sequence_starts: torch.Tensor | None,
    *,
    backend: Backend,
    windows: Sequence[Window],
    dtype: torch.dtype,
) -> Layout:
    """What attention must know of a batch, computed once for all layers.

    sequence_ids_BL: integers; equal neighbours in a row are one sequence, -1 is padding
    sequence_starts: int32 [S + 1], the slot of B * L where each run of equal ids begins, then B * L, as often
        as one likes; None: found here, which waits for the device
    backend: not "auto"; windows: of all layers
    """
    shape = (sequence_ids_BL.shape[0], sequence_ids_BL.shape[1])
    if backend in ("sdpa", "eager"):
        masks = {window: sequence_mask(sequence_ids_BL, dtype, window) for window in windows}
        return Layout(Rows(shape, masks, backend == "sdpa"), None, None)
    if backend == "flex":
        return Layout(Flex(shape, _block_masks(sequence_ids_BL, windows)), None, None)
    if sequence_starts is None:
        sequence_starts = find_starts(sequence_ids_BL)
    if backend in ("varlen", "flash"):
        return Layout(Varlen(sequence_starts, shape[1], backend == "flash"), None, None)
    return _group(sequence_ids_BL, sequence_starts, windows, dtype)


def find_starts(sequence_ids_BL: torch.Tensor) -> torch.Tensor:
    """int32 [S + 1]: the slots of B * L at which a row or another sequence begins, then B * L."""
    is_start = torch.ones_like(sequence_ids_BL, dtype=torch.bool)
    is_start[:, 1:] = sequence_ids_BL[:, 1:] != sequence_ids_BL[:, :-1]
    starts = is_start.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([sequence_ids_BL.numel()])]).to(torch.int32)


def sequence_mask(
    sequence_ids_BL: torch.Tensor, dtype: torch.dtype, window: Window = None
) -> torch.Tensor:
    """What to add to attention scores: 0 within a sequence (and window), -inf across. [B, 1, L, L] of `dtype`.

    sequence_ids_BL: any integers; equal ids in a row are one sequence. The padding of a row (all
    -1) thereby is a sequence of its own: it attends to itself, nothing else attends to it, and no
    slot has -inf only.
    """
    allowed_BLL = sequence_ids_BL[:, :, None] == sequence_ids_BL[:, None, :]
    if window is not None:
        allowed_BLL = allowed_BLL & _near(sequence_ids_BL.shape[1], window, sequence_ids_BL.device)
    mask_BLL = torch.zeros(allowed_BLL.shape, dtype=dtype, device=allowed_BLL.device)
    return mask_BLL.masked_fill_(~allowed_BLL, -math.inf).unsqueeze(1)


def attend(
    query_THK: torch.Tensor,
    key_THK: torch.Tensor,
    value_THK: torch.Tensor,
    segments: Segments,
    *,
    window: Window,
    dropout: float,
) -> torch.Tensor:
    """Attention with probabilities dropped out at rate `dropout` (0 in evaluation). [T, H * K].

    segments: of `lay_out`, with `window` among its windows.
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
        from torch.nn.attention.varlen import varlen_attn

        attended = varlen_attn(
            query_THK, key_THK, value_THK, starts, starts, longest, longest, window_size=sides
        )
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
        if window is not None and length > BLOCKS_PAY_OFF * window:
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


def _near(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Boolean [L, L]: at most `window` slots apart."""
    slots = torch.arange(length, device=device)
    return (slots[:, None] - slots[None, :]).abs() <= window


def _group(
    sequence_ids_BL: torch.Tensor,
    sequence_starts: torch.Tensor,
    windows: Sequence[Window],
    dtype: torch.dtype,
) -> Layout:
    """Sequences by length, the longest first; each group in as many slots as its longest needs."""
    device = sequence_ids_BL.device
    bounds = sequence_starts.to("cpu", torch.int64)
    starts, lengths = bounds[:-1], bounds.diff()
    flat_ids = sequence_ids_BL.flatten()
    is_real = lengths > 0
    is_real[is_real.clone()] = flat_ids[starts[is_real].to(device)].cpu() >= 0
    starts, lengths = starts[is_real], lengths[is_real]
    lengths, order = lengths.sort(descending=True, stable=True)
    starts = starts[order]
    groups, slots, shown, first = [], [], [], 0
    sizes = lengths.tolist()
    while first < len(sizes):
        longest = -(-sizes[first] // ROUND_LENGTH) * ROUND_LENGTH
        last = first
        while (last < len(sizes) and sizes[last] >= SHORTEST_OF_GROUP * longest) or last == first:
            last += 1
        longest = sizes[first] if sizes[first] == sizes[last - 1] else longest
        within = torch.arange(longest)
        is_token = within < lengths[first:last, None]
        slots.append(
            torch.where(is_token, starts[first:last, None] + within, starts[first:last, None])
        )
        shown.append(is_token.flatten())
        masks = _group_masks(is_token, windows, dtype, device)
        groups.append(Group(last - first, longest, masks))
        first = last
    slot_T = torch.cat([part.flatten() for part in slots]) if slots else bounds[:0]
    is_shown = torch.cat(shown) if shown else slot_T.bool()
    place = torch.zeros(sequence_ids_BL.numel(), dtype=torch.int64)
    place[slot_T[is_shown]] = is_shown.nonzero().flatten()
    return Layout(Grouped(tuple(groups)), slot_T.to(device), place.to(device))


def _group_masks(
    is_token_NG: torch.Tensor, windows: Sequence[Window], dtype: torch.dtype, device: torch.device
) -> dict[Window, torch.Tensor | None]:
    length = is_token_NG.shape[1]
    padding = None
    if not is_token_NG.all():
        padding = torch.zeros(is_token_NG.shape, dtype=dtype)
        padding = padding.masked_fill_(~is_token_NG, -math.inf)[:, None, None, :].to(device)
    masks: dict[Window, torch.Tensor | None] = {None: padding}
    for window in windows:
        if window is None or length > BLOCKS_PAY_OFF * window:
            continue
        masks[window] = padding
        if length > window + 1:
            allowed = _near(length, window, torch.device("cpu"))
            allowed = allowed & is_token_NG[:, None, :] if padding is not None else allowed[None]
            allowed = allowed | ~allowed.any(
                -1, keepdim=True
            )  # padded queries far from every token
            mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -math.inf)
            masks[window] = mask[:, None].to(device)
    return masks


def _block_masks(sequence_ids_BL: torch.Tensor, windows: Sequence[Window]) -> dict[Window, Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = sequence_ids_BL.shape

    def build(window: Window) -> Any:
        def allowed(
            row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
        ) -> torch.Tensor:
            del head
            same = sequence_ids_BL[row, query] == sequence_ids_BL[row, key]
            return same if window is None else same & ((query - key).abs() <= window)

        return create_block_mask(allowed, rows, None, length, length, device=sequence_ids_BL.device)

    return {window: build(window) for window in windows}
