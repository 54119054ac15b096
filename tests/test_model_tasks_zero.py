"""Two real ranks whose micro-batches have different tasks, under ZeRO: none waits, all is as in one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, environment


def test_ranks_with_other_tasks_train_as_one_process(tmp_path: Path) -> None:
    """Four steps of two micro-batches: losses and gradient norms, and how far each weight moved."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        str(ROOT / "tests" / "tasks_worker.py"), str(tmp_path), "2", "3",
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
        for stage in ("2", "3"):
            assert found[stage]["losses"] == pytest.approx(found["losses"], rel=1e-4)
            assert found[stage]["norms"] == pytest.approx(found["norms"], rel=1e-3)
            wrong = {name: e for name, e in found[stage]["errors"].items() if not e < 1e-2}
            assert not wrong
