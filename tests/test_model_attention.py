"""Attention of packed rows: each sequence as if alone, both backends alike, padding harmless."""

import pytest
import torch
import torch.nn.functional as F

from model.attention import Backend, attend, sequence_mask
from model.dropout import drop_out

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
BACKENDS: tuple[Backend, ...] = ("sdpa", "eager")


def random_qkv(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)
    )
    return query, key, value


def run(
    backend: Backend, qkv: Tensors, sequence_ids: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output, and gradients of a weighted sum of it."""
    mask = sequence_mask(sequence_ids, qkv[0].dtype)
    output = attend(*qkv, mask, dropout=0.0, backend=backend)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((output * weights).sum(), qkv)
    return output.detach(), list(gradients)


SEQUENCE_IDS = torch.tensor(
    [[0] * 5 + [1] * 9 + [2] * 3 + [-1] * 3, [0] * 20, [0] * 1 + [-1] * 19], dtype=torch.int32
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_each_sequence_alone(backend: Backend) -> None:
    qkv = random_qkv((3, 2, 20, 8))
    output, gradients = run(backend, qkv, SEQUENCE_IDS)
    for row in range(3):
        for sequence in SEQUENCE_IDS[row].unique().tolist():
            slots = (SEQUENCE_IDS[row] == sequence).nonzero().flatten()
            query, key, value = (tensor[row, :, slots] for tensor in qkv)
            scores = query @ key.transpose(1, 2) / 8**0.5
            alone = scores.softmax(-1) @ value
            torch.testing.assert_close(output[row, :, slots], alone, rtol=0, atol=2e-6)
    # No gradient crosses: that of the first sequence does not know the others' weights.
    query, key, value = (tensor.detach()[:1, :, :5].clone().requires_grad_() for tensor in qkv)
    cut = query, key, value
    mask = sequence_mask(SEQUENCE_IDS[:1, :5], torch.float32)
    weights = torch.randn(3, 2, 20, 8, generator=torch.Generator().manual_seed(2))[:1, :, :5]
    alone = torch.autograd.grad(
        (attend(*cut, mask, dropout=0.0, backend=backend) * weights).sum(), cut
    )
    for packed, expected in zip(gradients, alone, strict=True):
        torch.testing.assert_close(packed[:1, :, :5], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_backends_agree(dtype: torch.dtype, tolerance: float) -> None:
    qkv = random_qkv((3, 2, 20, 8), dtype)
    output, gradients = run("sdpa", qkv, SEQUENCE_IDS)
    expected_output, expected_gradients = run("eager", qkv, SEQUENCE_IDS)
    for value, expected in zip(
        [output, *gradients], [expected_output, *expected_gradients], strict=True
    ):
        assert torch.isfinite(value).all()
        scale = expected.abs().max()
        torch.testing.assert_close(value / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_rows_whose_first_blocks_are_all_masked(backend: Backend) -> None:
    """Fused kernels go through the keys in blocks of hundreds; a whole block may be forbidden."""
    sequence_ids = torch.tensor([[0] * 1030 + [1] * 6 + [-1] * 4], dtype=torch.int32)
    qkv = random_qkv((1, 2, 1040, 8))
    output, gradients = run(backend, qkv, sequence_ids)
    query, key, value = (tensor[:, :, 1030:1036] for tensor in qkv)
    alone = (query @ key.transpose(2, 3) / 8**0.5).softmax(-1) @ value
    torch.testing.assert_close(output[:, :, 1030:1036], alone, rtol=0, atol=2e-6)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_expectation(backend: Backend) -> None:
    """The values are all one: every output is the sum of the probabilities that were kept."""
    query, key, _ = random_qkv((64, 4, 16, 8))
    mask = sequence_mask(torch.zeros(64, 16, dtype=torch.int32), torch.float32)
    torch.manual_seed(3)
    output = attend(query, key, torch.ones_like(key), mask, dropout=0.25, backend=backend)
    assert output.mean().item() == pytest.approx(1.0, abs=0.02)
    assert output.std().item() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_own_dropout_is_that_of_torch(dtype: torch.dtype, probability: float) -> None:
    """Other zeros at the same rate (within 5 deviations), independent; the same other value."""
    values = torch.ones(999, 1001, dtype=dtype, requires_grad=True)
    torch.manual_seed(4)
    mine, twin = drop_out(values, probability), F.dropout(values, probability)
    torch.testing.assert_close(mine.unique(), twin.unique(), rtol=1e-4, atol=0)
    zeros = mine.detach() == 0
    tolerance = 5 * (probability * (1 - probability) / values.numel()) ** 0.5
    assert zeros.float().mean().item() == pytest.approx(probability, abs=tolerance)
    # Of values next to each other (they share a random number) both go at the rate squared.
    for shift in (1, 2, 3, 4):
        both = (zeros[:, shift:] & zeros[:, :-shift]).float().mean().item()
        assert both == pytest.approx(probability**2, abs=tolerance)
    (gradient,) = torch.autograd.grad(mine.sum(), values)
    assert torch.equal(gradient, mine.detach())


def test_dropout_of_nothing_and_none() -> None:
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drop_out(values, 0.0), values)
    assert drop_out(values[:0], 0.1).shape == (0, 3)
    torch.manual_seed(6)
    first = drop_out(values, 0.5)
    torch.manual_seed(6)
    assert torch.equal(drop_out(values, 0.5), first)
