"""Sequence numbers of a batch in, how it lies in flat slots out: what attention must know, once for all layers.

Which backend wants what: `model.attention`.
"""

# B rows, L slots of a row, T flat slots, N sequences of a group, G slots of each of them

import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from model.config import Backend, ModelConfig

Window = int | None  # tokens to each side that are attended to; None: the whole sequence
HALF = (torch.bfloat16, torch.float16)
OF_GPUS: tuple[Backend, ...] = ("short_rows", "varlen", "flash", "flex")
OF_HALF: tuple[Backend, ...] = ("short_rows", "varlen", "flash")
PACKAGE_OF: dict[Backend, str] = {"short_rows": "triton", "flash": "flash_attn"}
# short_rows: all of a row is on the chip at once, in so much of a block's shared memory
LONGEST_SHORT_ROW, LARGEST_SHORT_HEAD, SHARED_BYTES = 128, 64, 116 << 10
LARGEST_FLASH_HEAD = 256
ROUND_LENGTH = 8  # grouped: lengths are rounded up to multiples of this,
SHORTEST_OF_GROUP = 0.9  # and a group holds sequences of this share of its longest, or more
BLOCKS_PAY_OFF = (
    4  # windows: local attention goes block by block where sequences are longer than this
)


def choose_backend(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, row_length: int
) -> Backend:
    """The backend that computes attention of rows of `row_length` slots: which one "auto" stands for here.

    dtype: of the weights. ValueError where the one asked for cannot run here.
    """
    backend = config.attention
    if backend == "auto":
        return _best_backend(config, device, dtype, row_length)
    if backend in OF_GPUS and device.type != "cuda":
        raise ValueError(
            f"attention {backend!r} needs a GPU, this is {device.type}: use 'grouped' or 'auto'"
        )
    if backend in PACKAGE_OF and not _is_installed(PACKAGE_OF[backend]):
        package = PACKAGE_OF[backend].replace("_", "-")
        raise ValueError(
            f"attention {backend!r} needs the package {package}: pip install {package}"
        )
    if backend in OF_HALF and dtype not in HALF:
        raise ValueError(
            f"attention {backend!r} needs precision bf16, not {dtype}: use 'sdpa' or 'auto'"
        )
    if backend in ("varlen", "flash") and config.is_causal:
        raise ValueError(
            f"attention {backend!r} shows every slot its whole sequence, but clm, prefix_lm and denoise have "
            "causal rows: use 'sdpa', 'flex' or 'auto'"
        )
    if backend in ("varlen", "flash") and not _fits_flash(config):
        raise ValueError(
            f"attention {backend!r} needs heads of a multiple of 8 features, at most {LARGEST_FLASH_HEAD}, not "
            f"{config.head_size}: use 'sdpa' or 'auto'"
        )
    if backend == "short_rows" and not _is_short(config, device, row_length):
        raise ValueError(
            f"attention 'short_rows' is for rows of up to {LONGEST_SHORT_ROW} slots and heads of an even "
            f"number of features up to {LARGEST_SHORT_HEAD}, not {row_length} and {config.head_size}; and for "
            f"GPUs with {SHARED_BYTES >> 10} KB of shared memory a block: use 'auto'"
        )
    return backend


def _best_backend(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, row_length: int
) -> Backend:
    if device.type == "cpu":
        return "grouped"
    if dtype not in HALF:
        return "sdpa"
    if _is_installed("triton") and _is_short(config, device, row_length):
        return "short_rows"
    return "varlen" if _fits_flash(config) and not config.is_causal else "sdpa"


def _is_short(config: ModelConfig, device: torch.device, row_length: int) -> bool:
    is_small = row_length <= LONGEST_SHORT_ROW and config.head_size <= LARGEST_SHORT_HEAD
    return is_small and config.head_size % 2 == 0 and _shared_bytes(device) >= SHARED_BYTES


def _fits_flash(config: ModelConfig) -> bool:
    return config.head_size % 8 == 0 and config.head_size <= LARGEST_FLASH_HEAD


def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a block of this GPU may have; 0 where torch does not tell, as of AMD's."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0)


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


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


class ShortRows(NamedTuple):
    """sequence_ids: [B, L]; visible: int32 [B, L], no slot's before itself, or None."""

    sequence_ids: torch.Tensor
    visible: torch.Tensor | None


Segments = Grouped | Rows | Varlen | Flex | ShortRows


class Layout(NamedTuple):
    """How a batch lies in flat slots."""

    segments: Segments
    slot_T: torch.Tensor | None  # int64, of the B * L slots the one that each flat slot shows
    place: torch.Tensor | None  # int64 [B * L], the flat slot that shows it; None: the same numbers


def lay_out(
    sequence_ids_BL: torch.Tensor,
    sequence_starts: torch.Tensor | None,
    visible_BL: torch.Tensor | None = None,
    *,
    backend: Backend,
    windows: Sequence[Window],
    dtype: torch.dtype,
) -> Layout:
    """What attention must know of a batch, computed once for all layers.

    sequence_ids_BL: integers; equal neighbours in a row are one sequence, -1 is padding
    sequence_starts: int32 [S + 1], the slot of B * L where each run of equal ids begins, then B * L, as often
        as one likes; None: found here, which waits for the device
    visible_BL: int32, the last slot of its row that a slot attends to, within its sequence; itself it sees
        in any case. None: all of its sequence
    backend: not "auto"; windows: of all layers
    """
    shape = (sequence_ids_BL.shape[0], sequence_ids_BL.shape[1])
    if visible_BL is not None:
        own = torch.arange(shape[1], dtype=visible_BL.dtype, device=visible_BL.device)
        visible_BL = torch.maximum(visible_BL, own)
    if backend in ("sdpa", "eager"):
        masks = {w: sequence_mask(sequence_ids_BL, dtype, w, visible_BL) for w in windows}
        return Layout(Rows(shape, masks, backend == "sdpa"), None, None)
    if backend == "short_rows":
        return Layout(ShortRows(sequence_ids_BL, visible_BL), None, None)
    if backend == "flex":
        return Layout(Flex(shape, _block_masks(sequence_ids_BL, windows, visible_BL)), None, None)
    if sequence_starts is None:
        sequence_starts = find_starts(sequence_ids_BL)
    if backend in ("varlen", "flash"):
        if visible_BL is not None:
            raise ValueError(
                f"attention {backend!r} cannot compute rows with `visible`: use 'sdpa'"
            )
        return Layout(Varlen(sequence_starts, shape[1], backend == "flash"), None, None)
    return _group(sequence_ids_BL, sequence_starts, visible_BL, windows, dtype)


def find_starts(sequence_ids_BL: torch.Tensor) -> torch.Tensor:
    """int32 [S + 1]: the slots of B * L at which a row or another sequence begins, then B * L."""
    is_start = torch.ones_like(sequence_ids_BL, dtype=torch.bool)
    is_start[:, 1:] = sequence_ids_BL[:, 1:] != sequence_ids_BL[:, :-1]
    starts = is_start.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([sequence_ids_BL.numel()])]).to(torch.int32)


def sequence_mask(
    sequence_ids_BL: torch.Tensor,
    dtype: torch.dtype,
    window: Window = None,
    visible_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """What to add to attention scores: 0 within a sequence (and window), -inf across. [B, 1, L, L] of `dtype`.

    sequence_ids_BL: any integers; equal ids in a row are one sequence. The padding of a row (all
    -1) thereby is a sequence of its own: it attends to itself, nothing else attends to it, and no
    slot has -inf only. visible_BL: as in `lay_out`, no slot's before itself.
    """
    allowed_BLL = sequence_ids_BL[:, :, None] == sequence_ids_BL[:, None, :]
    if window is not None:
        allowed_BLL = allowed_BLL & _near(sequence_ids_BL.shape[1], window, sequence_ids_BL.device)
    if visible_BL is not None:
        slots = torch.arange(sequence_ids_BL.shape[1], device=sequence_ids_BL.device)
        allowed_BLL = allowed_BLL & (slots <= visible_BL[:, :, None])
    mask_BLL = torch.zeros(allowed_BLL.shape, dtype=dtype, device=allowed_BLL.device)
    return mask_BLL.masked_fill_(~allowed_BLL, -math.inf).unsqueeze(1)


def _near(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Boolean [L, L]: at most `window` slots apart."""
    slots = torch.arange(length, device=device)
    return (slots[:, None] - slots[None, :]).abs() <= window


def _group(
    sequence_ids_BL: torch.Tensor,
    sequence_starts: torch.Tensor,
    visible_BL: torch.Tensor | None,
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
    visible = None if visible_BL is None else visible_BL.flatten().to("cpu", torch.int64)
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
        starts_N1 = starts[first:last, None]
        slots.append(torch.where(is_token, starts_N1 + within, starts_N1))
        shown.append(is_token.flatten())
        visible_NG = None
        if visible is not None:  # counted within the sequence
            visible_NG = visible[slots[-1]] - starts_N1 % sequence_ids_BL.shape[1]
        masks = _group_masks(is_token, visible_NG, windows, dtype, device)
        groups.append(Group(last - first, longest, masks))
        first = last
    slot_T = torch.cat([part.flatten() for part in slots]) if slots else bounds[:0]
    is_shown = torch.cat(shown) if shown else slot_T.bool()
    place = torch.zeros(sequence_ids_BL.numel(), dtype=torch.int64)
    place[slot_T[is_shown]] = is_shown.nonzero().flatten()
    return Layout(Grouped(tuple(groups)), slot_T.to(device), place.to(device))


def _group_masks(
    is_token_NG: torch.Tensor,
    visible_NG: torch.Tensor | None,
    windows: Sequence[Window],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[Window, torch.Tensor | None]:
    """For the whole sequence, and each window that is not attended to block by block."""
    length = is_token_NG.shape[1]
    everything = is_token_NG[:, None, :]
    is_partial = False
    if visible_NG is not None:
        seen = everything & (torch.arange(length) <= visible_NG[:, :, None])
        is_partial = bool((seen != everything).any())
        everything = seen if is_partial else everything
    padding = None if everything.all() else _to_add(everything, dtype, device)
    masks: dict[Window, torch.Tensor | None] = {None: padding}
    for window in windows:
        if window is None or (length > BLOCKS_PAY_OFF * window and not is_partial):
            continue
        masks[window] = padding
        if length > window + 1:
            near = _near(length, window, torch.device("cpu"))
            allowed = near[None] if padding is None else everything & near
            allowed = allowed | ~allowed.any(
                -1, keepdim=True
            )  # padded queries far from every token
            masks[window] = _to_add(allowed, dtype, device)
    return masks


def _to_add(allowed: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """To scores: 0 where allowed, else -inf. [N, 1, 1 or G, G]."""
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -math.inf)
    return mask[:, None].to(device)


def _block_masks(
    sequence_ids_BL: torch.Tensor, windows: Sequence[Window], visible_BL: torch.Tensor | None
) -> dict[Window, Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = sequence_ids_BL.shape

    def build(window: Window) -> Any:
        def allowed(
            row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
        ) -> torch.Tensor:
            del head
            same = sequence_ids_BL[row, query] == sequence_ids_BL[row, key]
            if visible_BL is not None:
                same = same & (key <= visible_BL[row, query])
            return same if window is None else same & ((query - key).abs() <= window)

        return create_block_mask(allowed, rows, None, length, length, device=sequence_ids_BL.device)

    return {window: build(window) for window in windows}
