"""What only a GPU can run: fused attention over flat slots, compiled layers, a training run."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import launch, read_metrics, tiny_preset
from test_model_attention import SEQUENCE_IDS, random_qkv
from test_model_bert import BATCH, WITHOUT_DROPOUT, packed_batch, total

from data.batch import Reader, build_loader
from data.lanes import DataConfig, StreamState
from model.attention import attend_projected
from model.config import Backend
from model.layout import Window, find_starts, lay_out
from model.weights import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCAB = 60


def on_gpu(value: Any) -> Any:
    """Tensors within dicts and tuples, too."""
    if isinstance(value, dict):
        return {name: on_gpu(each) for name, each in value.items()}
    return tuple(map(on_gpu, value)) if isinstance(value, tuple) else value.cuda()


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("backend", ["short_rows", "varlen", "sdpa", "flex", "grouped"])
def test_backends_agree_with_eager_on_a_gpu(backend: Backend, window: Window) -> None:
    """bf16, output and gradients within 2 % of the largest value."""
    outcomes = []
    for kind in (backend, "eager"):
        ids = SEQUENCE_IDS.cuda()
        qkv = [
            tensor.detach().cuda().bfloat16().requires_grad_() for tensor in random_qkv((80, 2, 32))
        ]
        starts = find_starts(ids)
        starts = torch.cat([starts, starts[-1:].expand(5)])  # as the loader fills up
        layout = lay_out(ids, starts, backend=kind, windows=[window], dtype=torch.bfloat16)
        flat = qkv if layout.slot_T is None else [tensor[layout.slot_T] for tensor in qkv]
        projected = torch.stack(flat, dim=1)
        output = attend_projected(projected, layout.segments, None, window=window, dropout=0.0)
        output = output if layout.place is None else output[layout.place]
        output = output * (ids.flatten() >= 0)[:, None]
        outcomes.append([output, *torch.autograd.grad(output.float().square().sum(), qkv)])
    for value, want in zip(*outcomes, strict=True):
        scale = want.abs().max()
        torch.testing.assert_close(value / scale, want / scale, rtol=0, atol=2e-2)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("backend", ["short_rows", "sdpa", "flex", "grouped"])
def test_causal_rows_agree_with_eager_on_a_gpu(backend: Backend, window: Window) -> None:
    """bf16, output and gradients within 2 % of the largest value; a prefix of 4 slots in each row."""
    outcomes = []
    for kind in (backend, "eager"):
        ids = SEQUENCE_IDS.cuda()
        visible = torch.arange(20, device="cuda").expand(4, 20).clamp(min=4).int()
        qkv = [
            tensor.detach().cuda().bfloat16().requires_grad_() for tensor in random_qkv((80, 2, 32))
        ]
        layout = lay_out(ids, None, visible, backend=kind, windows=[window], dtype=torch.bfloat16)
        flat = qkv if layout.slot_T is None else [tensor[layout.slot_T] for tensor in qkv]
        projected = torch.stack(flat, dim=1)
        output = attend_projected(projected, layout.segments, None, window=window, dropout=0.0)
        output = output if layout.place is None else output[layout.place]
        output = output * (ids.flatten() >= 0)[:, None]
        outcomes.append([output, *torch.autograd.grad(output.float().square().sum(), qkv)])
    for value, want in zip(*outcomes, strict=True):
        scale = want.abs().max()
        torch.testing.assert_close(value / scale, want / scale, rtol=0, atol=2e-2)


@pytest.mark.parametrize("backend", ["short_rows", "varlen"])
def test_dropped_probabilities_are_drawn_anew_and_keep_the_expectation(backend: Backend) -> None:
    """The values are all one: every output is the sum of the probabilities that were kept."""
    query, key, _ = (tensor.cuda().bfloat16() for tensor in random_qkv((64 * 16, 4, 32)))
    value = torch.ones_like(key).requires_grad_()
    ids = torch.zeros(64, 16, dtype=torch.int32, device="cuda")
    layout = lay_out(ids, None, backend=backend, windows=[None], dtype=torch.bfloat16)
    outputs, gradients = [], []
    for seed in (3, 3, 4):
        torch.cuda.manual_seed(seed)
        projected = torch.stack((query, key, value), dim=1)
        output = attend_projected(projected, layout.segments, None, window=None, dropout=0.25)
        outputs.append(output)
        gradients.append(torch.autograd.grad(output.float().sum(), value)[0])
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(gradients[0], gradients[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert outputs[0].float().mean().item() == pytest.approx(1.0, abs=0.02)
    assert outputs[0].float().std().item() > 0.05
    # What was kept forward is what passes gradients back: both sums are of the same probabilities.
    kept, passed = outputs[0].float().view(64, 16, 4, 32), gradients[0].float().view(64, 16, 4, 32)
    torch.testing.assert_close(kept.sum(1), passed.sum(1), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["short_rows", "varlen"])
def test_losses_are_those_of_the_cpu(backend: Backend) -> None:
    config = replace(WITHOUT_DROPOUT, hidden_size=64)
    expected = build(config, VOCAB)(**BATCH)
    model = build(replace(config, attention=backend), VOCAB).cuda().bfloat16()
    losses = model(**on_gpu(BATCH))
    for task, loss in expected.items():
        assert losses[task].loss_sum.item() == pytest.approx(loss.loss_sum.item(), rel=5e-3)


@pytest.mark.parametrize("backend", ["short_rows", "varlen"])
def test_compiled_layers_are_compiled_once(backend: Backend) -> None:
    """Batches with other numbers of sequences, of tokens and of masked slots fit what was compiled."""
    config = replace(WITHOUT_DROPOUT, hidden_size=64, attention=backend, compile=True)
    model = build(config, VOCAB).cuda().bfloat16()
    for number, lengths in enumerate(([[9, 7, 4], [24]], [[5, 13], [3]], [[20], [6, 6, 6, 6]])):
        batch = on_gpu(packed_batch(lengths, row_length=24))
        starts = find_starts(batch["sequence_ids"])
        batch["sequence_starts"] = torch.cat([starts, starts[-1:].expand(16 - len(starts))])
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            losses = model(**batch)
            total(losses).backward()
        assert torch.isfinite(losses["mlm"].loss_sum)


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_a_run_on_a_gpu_resumes(stage: str, tiny_dataset: Path, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    preset = tiny_preset(
        tmp_path,
        tiny_dataset,
        precision="bf16",
        deepspeed=str(root / "ds_configs" / f"{stage}.json"),
        model={"attention": "auto"},
    )
    first = launch(preset)
    assert first.returncode == 0, first.stderr
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    second = launch(preset)
    assert second.returncode == 0 and "resuming from" in second.stdout, second.stderr
    losses = [metric["loss"] for metric in read_metrics(tmp_path / "run")]
    assert losses[6:8] == pytest.approx(losses[-2:], rel=1e-2)


def test_batches_come_in_page_locked_memory(tiny_dataset: Path) -> None:
    config = DataConfig(path=str(tiny_dataset), sequence_length=64, num_lanes=4, num_workers=1)
    loader = build_loader(config, Reader(0, 1, 4, 4, seed=1), StreamState.start(4, 2))
    batch = next(loader).batch
    assert batch.input_ids.is_pinned() and batch.sequence_starts.is_pinned()
    assert all(tensor.is_pinned() for target in batch.targets.values() for tensor in target)
