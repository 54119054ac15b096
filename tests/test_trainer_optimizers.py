"""LAMB, Muon and averaged weights on real processes: at every ZeRO stage what one process computes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, environment, launch, read_metrics, tiny_preset
from transformers import AutoModel

from launcher import cli
from model.hf import import_hf
from trainer.muon import newton_schulz, plan_rounds
from trainer.optim_config import OptimConfig
from trainer.partitions import Fragment, Layout, Matrix
from trainer.saved_tensors import SavedPart, SavedTensors

STAGES = "0-0,1-1,2-2,3-3"  # written-read


def run_worker(worker: str, *arguments: object, processes: int) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        str(ROOT / "tests" / worker), *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("processes", "wanted", "number"),
    [(2, ".", 19), (4, "^(lamb zero[123]|muon zero[13]) fp32", 5)],
)
def test_every_stage_is_the_reference(
    processes: int, wanted: str, number: int, tmp_path: Path
) -> None:
    """Newton-Schulz makes the smallest directions of an update up to 485 times larger, and their rounding."""
    run_worker("optimizer_worker.py", tmp_path / "found.json", wanted, processes=processes)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == number
    for name, errors in found.items():
        is_muon, is_bf16 = name.startswith("muon"), name.endswith("bf16")
        limit = 1e-6 if not is_muon else 0.05 if is_bf16 else 1e-5
        assert errors["master"] < limit, (name, errors)
        assert errors["change"] < 5 * limit, (name, errors)
        assert errors["ema"] < limit, (name, errors)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two processes, which have read them again in found.json."""
    folder = tmp_path_factory.mktemp("checkpoints")
    output, stages = folder / "found.json", STAGES
    run_worker("elastic_worker.py", "write", folder, output, stages, processes=2)
    return folder


@pytest.mark.parametrize(
    ("processes", "stages"),
    [(2, STAGES), (1, "0-1,1-2_offload,2-3,3-0"), (4, "1-3_offload,3-0")],
)
def test_checkpoints_go_on_at_other_stages_and_world_sizes(
    processes: int, stages: str, checkpoints: Path, tmp_path: Path
) -> None:
    """Masters, moments, momentum and averages bit for bit; and bit for bit on, where nothing else changed."""
    output = checkpoints / "found.json"
    if processes != 2:
        output = tmp_path / "found.json"
        run_worker("elastic_worker.py", "read", checkpoints, output, stages, processes=processes)
    found = json.loads(output.read_text())
    assert len(found) == 3 * len(stages.split(","))
    for name, values in found.items():
        assert values["wrong"] == [], name
        assert values["loss"] < 1e-5, (name, values["loss"])
        assert values["not_bitwise"] == [] or processes != 2, name
        assert values["state"] == pytest.approx(1, rel=0.02), name


def test_a_run_with_muon_an_average_and_two_schedules(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped and continued bit for bit; the average is exported when asked for."""
    optim = {
        "name": "muon", "ema_decay": 0.75, "learning_rate": 1e-3, "warmup_steps": 2,
        "schedule": "wsd", "decay_steps": 2,
    }  # fmt: skip
    phases = [{"first_step": 5, "learning_rate": 4e-3, "warmup_steps": 1}]
    preset = tiny_preset(tmp_path, tiny_dataset, optim=optim, phases=phases, precision="bf16")
    run = tmp_path / "run"
    first = launch(preset, processes=2)
    assert first.returncode == 0, first.stderr
    before = read_metrics(run)
    third = 1 - 0.5**0.5
    rates = [5e-4, 1e-3, 1e-3, 1e-3, 1e-3 * third, 4e-3, 4e-3, 4e-3 * third]
    assert [m["learning_rate"] for m in before] == pytest.approx(rates)
    for step in (6, 8):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    again = launch(preset, processes=2)
    assert again.returncode == 0, again.stderr
    after = read_metrics(run)
    assert [m["loss"] for m in after] == [m["loss"] for m in before]
    assert [m["grad_norm"] for m in after] == [m["grad_norm"] for m in before]
    assert cli.main(["export", str(run), str(tmp_path / "raw")]) == 0
    assert cli.main(["export", str(run), str(tmp_path / "average"), "--ema"]) == 0
    raw, average = (import_hf(tmp_path / name)[0] for name in ("raw", "average"))
    with SavedTensors(run / "checkpoints" / "step-00000008") as saved:
        shapes = {name: value.shape for name, value in raw.items()}
        for part, weights in (("master", raw), ("ema", average)):
            kept = SavedPart(saved, part, shapes)
            assert all(torch.equal(weights[name], kept[name]) for name in shapes)
    assert not torch.equal(raw["layers.0.qkv.weight"], average["layers.0.qkv.weight"])
    assert "exponential" in (tmp_path / "average" / "README.md").read_text()
    AutoModel.from_pretrained(tmp_path / "average")


def test_matrices_are_worked_on_once_where_most_of_them_is() -> None:
    """Ten matrices of 8 elements, in slices of 20 as at ZeRO 1, and cut across all ranks as at ZeRO 3."""
    matrices = [Matrix(f"layers.{i}", 0, 2, 4) for i in range(10)]
    long = [[[] for _ in range(1)] for _ in range(4)]
    for i in range(10):
        for rank in range(4):
            begin, end = max(8 * i, 20 * rank), min(8 * i + 8, 20 * rank + 20)
            if begin < end:
                long[rank][0].append(Fragment(i, begin - 20 * rank, begin - 8 * i, end - begin))
    across = [[[Fragment(i, 2 * i, 2 * rank, 2) for i in range(10)]] for rank in range(4)]
    for fragments, moved in ((long, 8), (across, 60)):
        plans = [
            plan_rounds(Layout(matrices, {}, fragments, rank, torch.device("cpu")), 0)
            for rank in range(4)
        ]
        assert len({len(plan) for plan in plans}) == 1 and len(plans[0]) == 3
        done = [work.matrix.name for plan in plans for work in plan if work.matrix]
        assert sorted(done) == [matrix.name for matrix in matrices]
        sent = sum(
            f.length
            for rank, plan in enumerate(plans)
            for work in plan
            for other, f in enumerate(work.mine)
            if f and other != rank
        )
        assert sent == moved
        for plan in plans:
            for work in plan:
                assert sum(f.length for f in work.theirs if f) == (8 if work.matrix else 0)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (64, 64)])
def test_newton_schulz_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = newton_schulz(matrix)
    values = torch.linalg.svdvals(found)
    assert values[:-1].min() > 0.5 and values.max() < 1.25
    cosine = (found * (left @ right)).sum() / found.norm() / (left @ right).norm()
    assert cosine > 0.98
    assert not newton_schulz(torch.zeros(shape)).any()


def test_a_muon_update_is_as_large_as_adams() -> None:
    """0.2 sqrt(max(rows, columns)) of an orthogonal matrix: a root mean square of 0.2."""
    found = newton_schulz(torch.randn(64, 256, generator=torch.Generator().manual_seed(1)))
    assert (0.2 * 256**0.5 * found).square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"momentum": 1.0}, "optim.momentum 1.0 must be below 1"),
        ({"ema_decay": 1.0}, "optim.ema_decay 1.0 is not between 0 and 1"),
        ({"schedule": "wsd"}, "optim.decay_steps is 0: schedule wsd"),
        ({"decay_steps": 5}, "optim.decay_steps 5 is schedule wsd's alone, not linear's"),
        ({"schedule": "constant", "final_fraction": 0.1}, "schedule constant does not decay"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        OptimConfig(**changes)
    assert expected in str(caught.value)
