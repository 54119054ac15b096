"""The GPU's kernels for short rows agree with attention written out, by Triton's interpreter."""

import subprocess
import sys

import pytest
import torch
from support import ROOT, environment


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_model_gpu has them on the GPU itself")
def test_kernels_agree_with_attention_written_out() -> None:
    """In a process of its own: Triton interprets what is defined while the variable is set."""
    pytest.importorskip("triton", reason="needs the package triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/short_rows_interpreted.py"],
        cwd=ROOT, env=environment() | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "7 passed" in done.stdout, done.stdout + done.stderr
