"""The GPU's kernels for short rows agree with attention written out, by Triton's interpreter."""

import subprocess
import sys

import pytest
from support import ROOT, environment


def test_kernels_agree_with_attention_written_out() -> None:
    """In a process of its own: Triton interprets what is defined while the variable is set."""
    pytest.importorskip("triton", reason="needs the package triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/short_rows_interpreted.py"],
        cwd=ROOT, env=environment() | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "7 passed" in done.stdout, done.stdout + done.stderr
