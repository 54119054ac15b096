"""LAMB, Muon and averaged weights on real processes: at every ZeRO stage what one process computes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, environment

from trainer.muon import newton_schulz
from trainer.optim import OptimConfig


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
    ("processes", "wanted", "number"), [(2, ".", 19), (4, "^(lamb|muon) zero[13] fp32", 4)]
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
