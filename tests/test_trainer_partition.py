"""ZeRO 3 from the meta device: no rank ever holds the whole model, and what it trains is the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, environment

from trainer.memory import state_bytes


def test_no_rank_holds_the_whole_model(tmp_path: Path) -> None:
    """10 M parameters in 12 layers, two ranks: half the model each, and never more than a layer beside."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        str(ROOT / "tests" / "partition_worker.py"), str(tmp_path),
    ]  # fmt: skip
    paths = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        whole = 4 * found["num_parameters"]  # bytes in fp32
        assert found["held_bytes"]["build"] < 0.6 * whole  # its half, and a layer
        predicted = state_bytes(found["num_parameters"], world_size=2, precision="fp32")
        assert found["held_bytes"]["load"] == pytest.approx(
            predicted, rel=0.15
        )  # and DeepSpeed's buffers
        assert found["wrong"] == []
        assert found["losses"][0] == pytest.approx(found["twin_loss"], rel=1e-5)
        assert found["losses"][1] < found["losses"][0]
        assert found["num_decayed"] == found["num_matrices"]
