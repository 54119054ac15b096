"""Cases of test_model_short_rows: the kernels do what attention written out does, gradients too."""

import os
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from model.attention import attend_eager
from model.layout import sequence_mask
from model.rotary import rotate, rotations
from model.short_rows import attend_short_rows

assert os.environ["TRITON_INTERPRET"] == "1"


class Case(NamedTuple):
    rows: int
    length: int
    heads: int
    features: int
    window: int | None
    is_causal: bool
    is_rotated: bool


CASES = (
    Case(2, 24, 2, 32, None, False, False),
    Case(2, 24, 2, 32, 4, False, True),
    Case(2, 20, 1, 16, None, True, True),
    Case(1, 128, 1, 64, None, False, False),
    Case(2, 40, 2, 24, 3, True, True),
)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_attention_written_out(case: Case) -> None:
    rows, length, heads, features, window, is_causal, is_rotated = case
    generator = torch.Generator().manual_seed(0)
    num_slots = rows * length
    qkv = torch.randn(num_slots, 3, heads, features, generator=generator).requires_grad_()
    ids = (torch.rand(rows, length, generator=generator) < 0.08).cumsum(1).int()
    ids[0, -3:] = -1  # padding
    visible = None
    if is_causal:  # but for a prefix of five slots
        visible = torch.arange(length, dtype=torch.int32).clamp(min=4).repeat(rows, 1)
    positions = torch.randint(0, 100, (num_slots,), generator=generator)
    by = rotations(positions, features, 10_000.0) if is_rotated else None
    output = attend_short_rows(qkv, ids, visible, by, window=window, dropout=0.0)

    query, key, value = qkv.unbind(1)
    if by is not None:
        query, key = rotate(query, by), rotate(key, by)
    query, key, value = (
        each.unflatten(0, (rows, length)).transpose(1, 2) for each in (query, key, value)
    )
    mask = sequence_mask(ids, torch.float32, window, visible)
    expected = attend_eager(query, key, value, mask, 0.0).transpose(1, 2).flatten(0, 1).flatten(1)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    weights = torch.randn(output.shape, generator=generator)
    (gradient,) = torch.autograd.grad((output * weights).sum(), qkv)
    (want,) = torch.autograd.grad((expected * weights).sum(), qkv)
    torch.testing.assert_close(gradient, want, rtol=0, atol=1e-5)


def of_one_sequence(dropout: float) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Queries, keys and values of 8 rows of 32 slots, and attention that drops the same in every call."""
    qkv = torch.randn(8 * 32, 3, 2, 32, generator=torch.Generator().manual_seed(1))
    ids = torch.zeros(8, 32, dtype=torch.int32)

    def attend(given: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return attend_short_rows(given, ids, None, None, window=None, dropout=dropout)

    return qkv.requires_grad_(), attend


def test_gradients_are_of_the_probabilities_that_were_kept() -> None:
    qkv, attend = of_one_sequence(0.3)
    weights = torch.randn(8 * 32, 64, generator=torch.Generator().manual_seed(2))

    def loss(given: torch.Tensor) -> torch.Tensor:
        return (attend(given) * weights).sum()

    value = loss(qkv)
    (gradient,) = torch.autograd.grad(value, qkv)
    # linear in the values, so of them the first-order expansion is exact
    assert (gradient[:, 2] * qkv[:, 2]).sum().item() == pytest.approx(value.item(), rel=1e-4)
    direction = torch.randn(qkv.shape, generator=torch.Generator().manual_seed(3))
    direction[:, 2] = 0  # queries and keys
    moved = [loss(qkv.detach() + sign * 1e-3 * direction).item() for sign in (1, -1)]
    slope = (moved[0] - moved[1]) / 2e-3
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-2)


def test_probabilities_are_dropped_at_the_rate_and_one_by_one() -> None:
    """All queries 0: every probability is 1 / 32, and the sum of what is kept is binomial."""
    qkv, attend = of_one_sequence(0.3)
    uniform = qkv.detach().clone()
    uniform[:, 0] = 0
    uniform[:, 2] = 1
    num_kept = attend(uniform)[:, ::32] * 0.7 * 32  # of each slot and head
    deviation = (32 * 0.3 * 0.7) ** 0.5
    tolerance = 5 * deviation / num_kept.numel() ** 0.5
    assert num_kept.mean().item() == pytest.approx(32 * 0.7, abs=tolerance)
    assert num_kept.std().item() == pytest.approx(deviation, rel=0.15)
    assert torch.equal(attend(uniform), attend(uniform))
