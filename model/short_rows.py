"""Queries, keys and values of rows of at most 128 slots in, attended values out: kernels of our own for GPUs.

A block of threads has one head of one row, and all its scores fit on the chip. So nothing but queries, keys
and values is read and nothing but the result is written, forward and backward; the gradient comes as one
tensor, ready for the matrix that projected all three. FlashAttention (Dao et al. 2022) is for longer rows:
it keeps statistics, and reads more than once.
"""

# B rows, L slots of a row, T = B * L slots, H heads, K features of a head
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportIndexIssue=false

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _load_halves(
    pointer, length, stride: tl.constexpr, half: tl.constexpr,
    block: tl.constexpr, half_block: tl.constexpr,
):  # fmt: skip
    """The two halves of each slot's features, [block, half_block] each; 0 where there are none."""
    slots, features = tl.arange(0, block), tl.arange(0, half_block)
    places = pointer + slots[:, None] * stride + features[None, :]
    exists = (slots < length)[:, None] & (features < half)[None, :]
    return (
        tl.load(places, mask=exists, other=0.0),
        tl.load(places + half, mask=exists, other=0.0),
    )


@triton.jit
def _store_halves(
    pointer, first, second, length, stride: tl.constexpr, half: tl.constexpr,
    block: tl.constexpr, half_block: tl.constexpr,
):  # fmt: skip
    slots, features = tl.arange(0, block), tl.arange(0, half_block)
    places = pointer + slots[:, None] * stride + features[None, :]
    exists = (slots < length)[:, None] & (features < half)[None, :]
    tl.store(places, first.to(pointer.dtype.element_ty), mask=exists)
    tl.store(places + half, second.to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def _rotate(first, second, cosine, sine):
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    return (
        (first * cosine - second * sine).to(dtype),
        (second * cosine + first * sine).to(dtype),
    )


@triton.jit
def _probabilities(
    query_1, query_2, key_1, key_2, ids, visible, length, scale,
    window: tl.constexpr, is_causal: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Softmax over the keys of a slot's own sequence, fp32 [block, block]."""
    scores = tl.dot(query_1, tl.trans(key_1)) + tl.dot(query_2, tl.trans(key_2))
    slots = tl.arange(0, block)
    allowed = (ids[:, None] == ids[None, :]) & (slots < length)[None, :]
    if window >= 0:
        distance = slots[:, None] - slots[None, :]
        allowed = allowed & (distance <= window) & (distance >= -window)
    if is_causal:
        allowed = allowed & (slots[None, :] <= visible[:, None])
    scores = tl.where(allowed, scores * (scale * 1.4426950408889634), -1e30)
    weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _kept(seed_pointer, row, head, num_dropped: tl.constexpr, block: tl.constexpr):
    """What a probability is multiplied by: 0 at a rate of num_dropped / 65536. The same in every call.

    Eight neighbours share the four numbers of one draw (Salmon et al. 2011, Philox), 16 bits each.
    """
    slots = tl.arange(0, block)
    number = (head * block + slots)[:, None] * (block // 8) + tl.arange(0, block // 8)[None, :]
    a, b, c, d = tl.randint4x(tl.load(seed_pointer) + row, number, n_rounds=7)
    halves = tl.join(
        tl.join(tl.join(a & 0xFFFF, (a >> 16) & 0xFFFF), tl.join(b & 0xFFFF, (b >> 16) & 0xFFFF)),
        tl.join(tl.join(c & 0xFFFF, (c >> 16) & 0xFFFF), tl.join(d & 0xFFFF, (d >> 16) & 0xFFFF)),
    )
    draws = tl.reshape(halves, (block, block))
    return tl.where(draws >= num_dropped, 65536.0 / (65536 - num_dropped), 0.0)


@triton.jit
def _load_row(
    qkv, sequence_ids, visible, cosine, sine, row, head, length, scale,
    head_size: tl.constexpr, window: tl.constexpr, is_causal: tl.constexpr,
    is_rotated: tl.constexpr, hidden: tl.constexpr, block: tl.constexpr, half_block: tl.constexpr,
):  # fmt: skip
    """Of one head: halves of queries, keys (both turned) and values, probabilities, what was turned by."""
    slots = tl.arange(0, block)
    half: tl.constexpr = head_size // 2
    stride: tl.constexpr = 3 * hidden
    first_slot = (row * length).to(tl.int64)
    own = qkv + first_slot * stride + head * head_size
    query_1, query_2 = _load_halves(own, length, stride, half, block, half_block)
    key_1, key_2 = _load_halves(own + hidden, length, stride, half, block, half_block)
    value_1, value_2 = _load_halves(own + 2 * hidden, length, stride, half, block, half_block)
    cos, sin = 1.0, 0.0
    if is_rotated:
        turns = first_slot * head_size
        cos, _ = _load_halves(cosine + turns, length, head_size, half, block, half_block)
        sin, _ = _load_halves(sine + turns, length, head_size, half, block, half_block)
        query_1, query_2 = _rotate(query_1, query_2, cos, sin)
        key_1, key_2 = _rotate(key_1, key_2, cos, sin)
    ids = tl.load(sequence_ids + first_slot + slots, mask=slots < length, other=-2)
    seen = slots
    if is_causal:
        seen = tl.load(visible + first_slot + slots, mask=slots < length, other=0)
    probabilities = _probabilities(
        query_1, query_2, key_1, key_2, ids, seen, length, scale, window, is_causal, block
    )
    return query_1, query_2, key_1, key_2, value_1, value_2, probabilities, cos, sin


@triton.jit
def _forward_kernel(
    qkv, sequence_ids, visible, cosine, sine, seed, output, length, scale,
    head_size: tl.constexpr, window: tl.constexpr, is_causal: tl.constexpr,
    is_rotated: tl.constexpr, num_dropped: tl.constexpr, hidden: tl.constexpr,
    block: tl.constexpr, half_block: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = head_size // 2
    _, _, _, _, value_1, value_2, weights, _, _ = _load_row(
        qkv, sequence_ids, visible, cosine, sine, row, head, length, scale,
        head_size, window, is_causal, is_rotated, hidden, block, half_block,
    )  # fmt: skip
    if num_dropped > 0:
        weights = weights * _kept(seed, row, head, num_dropped, block)
    weights = weights.to(qkv.dtype.element_ty)
    out = output + (row * length).to(tl.int64) * hidden + head * head_size
    first, second = tl.dot(weights, value_1), tl.dot(weights, value_2)
    _store_halves(out, first, second, length, hidden, half, block, half_block)


@triton.jit
def _backward_kernel(
    qkv, sequence_ids, visible, cosine, sine, seed, gradient, qkv_gradient, length, scale,
    head_size: tl.constexpr, window: tl.constexpr, is_causal: tl.constexpr,
    is_rotated: tl.constexpr, num_dropped: tl.constexpr, hidden: tl.constexpr,
    block: tl.constexpr, half_block: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = head_size // 2
    stride: tl.constexpr = 3 * hidden
    first_slot = (row * length).to(tl.int64)
    grad_1, grad_2 = _load_halves(
        gradient + first_slot * hidden + head * head_size, length, hidden, half, block, half_block
    )
    query_1, query_2, key_1, key_2, value_1, value_2, weights, cos, sin = _load_row(
        qkv, sequence_ids, visible, cosine, sine, row, head, length, scale,
        head_size, window, is_causal, is_rotated, hidden, block, half_block,
    )  # fmt: skip
    dtype = qkv.dtype.element_ty
    weights_gradient = tl.dot(grad_1, tl.trans(value_1)) + tl.dot(grad_2, tl.trans(value_2))
    used = weights
    if num_dropped > 0:
        kept = _kept(seed, row, head, num_dropped, block)
        used = weights * kept
        weights_gradient = weights_gradient * kept
    used = tl.trans(used.to(dtype))
    out = qkv_gradient + first_slot * stride + head * head_size
    first, second = tl.dot(used, grad_1), tl.dot(used, grad_2)
    _store_halves(out + 2 * hidden, first, second, length, stride, half, block, half_block)
    mean = tl.sum(weights * weights_gradient, axis=1)
    scores_gradient = (weights * (weights_gradient - mean[:, None]) * scale).to(dtype)
    query_grad_1, query_grad_2 = tl.dot(scores_gradient, key_1), tl.dot(scores_gradient, key_2)
    turned = tl.trans(scores_gradient)
    key_grad_1, key_grad_2 = tl.dot(turned, query_1), tl.dot(turned, query_2)
    if is_rotated:  # back
        query_grad_1, query_grad_2 = _rotate(query_grad_1, query_grad_2, cos, -sin)
        key_grad_1, key_grad_2 = _rotate(key_grad_1, key_grad_2, cos, -sin)
    _store_halves(out, query_grad_1, query_grad_2, length, stride, half, block, half_block)
    _store_halves(out + hidden, key_grad_1, key_grad_2, length, stride, half, block, half_block)


def attend_short_rows(
    qkv_T3HK: torch.Tensor,
    sequence_ids_BL: torch.Tensor,
    visible_BL: torch.Tensor | None,
    rotations: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    window: int | None,
    dropout: float,
) -> torch.Tensor:
    """Attended values [T, H * K].

    visible_BL: int32, no slot's before itself; rotations: cosines and sines, fp32 [T, 1, K], of which queries
    and keys are turned by
    """
    seed = None
    if dropout:
        seed = torch.randint(1 << 40, (1,), device=qkv_T3HK.device)
    cosine, sine = rotations or (None, None)
    return _attend(
        qkv_T3HK, sequence_ids_BL, visible_BL, cosine, sine, seed,
        -1 if window is None else window, dropout,
    )  # fmt: skip


@torch.library.custom_op("cloze::attend_short_rows", mutates_args=())
def _attend(
    qkv: torch.Tensor,
    sequence_ids: torch.Tensor,
    visible: torch.Tensor | None,
    cosine: torch.Tensor | None,
    sine: torch.Tensor | None,
    seed: torch.Tensor | None,
    window: int,
    dropout: float,
) -> torch.Tensor:
    num_slots, _, num_heads, head_size = qkv.shape
    output = qkv.new_empty(num_slots, num_heads * head_size)
    _launch(
        _forward_kernel, FORWARD_WARPS, qkv, sequence_ids, visible, cosine, sine, seed,
        (output,), window, dropout,
    )  # fmt: skip
    return output


@torch.library.custom_op("cloze::attend_short_rows_backward", mutates_args=())
def _attend_backward(
    gradient: torch.Tensor,
    qkv: torch.Tensor,
    sequence_ids: torch.Tensor,
    visible: torch.Tensor | None,
    cosine: torch.Tensor | None,
    sine: torch.Tensor | None,
    seed: torch.Tensor | None,
    window: int,
    dropout: float,
) -> torch.Tensor:
    qkv_gradient = torch.empty_like(qkv)
    _launch(
        _backward_kernel, BACKWARD_WARPS, qkv, sequence_ids, visible, cosine, sine, seed,
        (gradient.contiguous(), qkv_gradient), window, dropout,
    )  # fmt: skip
    return qkv_gradient


FORWARD_WARPS, BACKWARD_WARPS = 8, 8


def _launch(
    kernel: Any, num_warps: int, qkv: torch.Tensor, sequence_ids: torch.Tensor, visible: Any,
    cosine: Any, sine: Any, seed: Any, rest: tuple[torch.Tensor, ...], window: int, dropout: float,
) -> None:  # fmt: skip
    rows, length = sequence_ids.shape
    num_heads, head_size = qkv.shape[2:]
    kernel[rows, num_heads](
        qkv, sequence_ids, visible, cosine, sine, seed, *rest, length, head_size**-0.5,
        head_size=head_size, window=window, is_causal=visible is not None,
        is_rotated=cosine is not None, num_dropped=min(round(dropout * 65536), 65535),
        hidden=num_heads * head_size,
        block=max(16, triton.next_power_of_2(length)),
        half_block=max(16, triton.next_power_of_2(head_size // 2)), num_warps=num_warps,
    )  # fmt: skip


@_attend.register_fake
def _(qkv: torch.Tensor, *_: Any) -> torch.Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3])


@_attend_backward.register_fake
def _(gradient: torch.Tensor, qkv: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(qkv)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.window, ctx.dropout = inputs[6:]


def _backward(ctx: Any, gradient: torch.Tensor) -> Any:
    return (
        _attend_backward(gradient, *ctx.saved_tensors, ctx.window, ctx.dropout),
        *[None] * 7,
    )


_attend.register_autograd(_backward, setup_context=_keep)
