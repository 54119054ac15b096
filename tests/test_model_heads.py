"""Heads on labelled rows only equal heads on every row, forward and backward, also without rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import heads
from model.heads import MlmHead, classify_masked, classify_rows, classify_rows_dense
from model.task_heads import ClassHead

HIDDEN, VOCAB = 16, 50


def make_head(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return MlmHead(VOCAB, HIDDEN, 1e-12) if kind == "mlm" else ClassHead(HIDDEN, 2)


def rows(num_classes: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(60, HIDDEN, generator=generator).requires_grad_()
    index = torch.randperm(60, generator=generator)[:num_rows]
    return hidden, index, torch.randint(num_classes, (num_rows,), generator=generator)


@pytest.mark.parametrize("num_rows", [0, 1, 9, 60])
@pytest.mark.parametrize(("kind", "num_classes"), [("mlm", VOCAB), ("nsp", 2)])
def test_labelled_rows_only_equals_all_rows(kind: str, num_classes: int, num_rows: int) -> None:
    head = make_head(kind)
    hidden, index, labels = rows(num_classes, num_rows)
    inputs = [hidden, *head.parameters()]
    loss, hits = classify_rows(head, hidden, index, labels)
    dense_loss, dense_hits = classify_rows_dense(head, hidden, index, labels)
    assert hits == dense_hits
    torch.testing.assert_close(loss, dense_loss, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(loss, inputs)
    dense_gradients = torch.autograd.grad(dense_loss, inputs)
    for gradient, dense in zip(gradients, dense_gradients, strict=True):
        torch.testing.assert_close(gradient, dense, rtol=1e-5, atol=1e-5)
        assert bool(gradient.any()) == (num_rows > 0)


@pytest.mark.parametrize("rows_at_once", [1, 7, 9, 1000])
@pytest.mark.parametrize("num_rows", [0, 1, 9, 60])
def test_logits_of_some_rows_at_a_time_change_nothing(
    num_rows: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, hits and every gradient are those of all rows at once, also scaled, and twice."""
    monkeypatch.setitem(heads.LOGITS_AT_ONCE, "cpu", rows_at_once * VOCAB)
    head = make_head("mlm")
    assert isinstance(head, MlmHead)
    hidden, index, labels = rows(VOCAB, num_rows)
    inputs = [hidden, *head.parameters()]
    loss, hits = classify_masked(head, hidden, index, labels)
    want_loss, want_hits = classify_rows(head, hidden, index, labels)
    assert hits == want_hits and hits.dtype == torch.int64 and not hits.requires_grad
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=1e-6)
    wanted = torch.autograd.grad(want_loss * 0.37, inputs)
    for _ in range(2):
        gradients = torch.autograd.grad(loss * 0.37, inputs, retain_graph=True)
        for gradient, want in zip(gradients, wanted, strict=True):
            assert gradient.dtype == want.dtype
            torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(classify_masked(head, hidden, index, labels)[0], loss)


def test_gradients_in_bf16_stay_near_those_of_fp32() -> None:
    """Chunks are summed in fp32: the error is that of one rounding, not of one for each chunk."""
    exact, rounded = make_head("mlm"), make_head("mlm").bfloat16()
    hidden, index, labels = rows(VOCAB, 60)
    for head, dtype in ((exact, torch.float32), (rounded, torch.bfloat16)):
        assert isinstance(head, MlmHead)
        classify_masked(head, hidden.to(dtype), index, labels)[0].backward()
    for (name, want), got in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert want.grad is not None and got.grad is not None
        error = (got.grad.float() - want.grad).norm() / want.grad.norm()
        assert error < 0.02, name


def test_hits_are_the_likeliest_classes() -> None:
    head = make_head("mlm")
    hidden, index, labels = rows(VOCAB, 20)
    best = head(hidden[index]).argmax(-1)
    labels[:7] = best[:7]
    labels[7:] = (best[7:] + 1) % VOCAB
    assert classify_rows(head, hidden, index, labels)[1] == 7


def test_loss_of_bf16_logits_is_computed_in_fp32() -> None:
    """Of the same bf16 logits; in bf16 the sum would be off by up to 1 in 256."""
    head = make_head("mlm").bfloat16()
    hidden, index, labels = rows(VOCAB, 60)
    loss, _ = classify_rows(head, hidden.bfloat16(), index, labels)
    logits = head(hidden.bfloat16()[index]).double()
    assert loss.dtype == torch.float32
    exact = F.cross_entropy(logits, labels, reduction="sum")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_tied_decoder_is_one_parameter_and_stays_so() -> None:
    words = nn.Embedding(VOCAB, HIDDEN)
    model = nn.ModuleDict({"words": words, "head": make_head("mlm")})
    head = model["head"]
    assert isinstance(head, MlmHead)
    head.tie(words)
    model.to(torch.bfloat16)
    assert head.decoder.weight is words.weight
    assert "head.decoder.weight" not in dict(model.named_parameters())
    assert head.decoder.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("has_grad", [True, False])
def test_what_a_compiler_fuses_is_the_same_loss(has_grad: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(7, VOCAB, generator=generator)
    labels = torch.randint(VOCAB, (7, 1), generator=generator)
    fused = heads.loss_of_logits_fused(logits.clone(), labels, has_grad)
    plain = heads.loss_of_logits(logits.clone(), labels, has_grad)
    assert fused[1] == plain[1]
    for value, want in zip(fused, plain, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-6)
