"""The benchmarks of the model run from end to end, at a size that says nothing about speed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, environment, write_corpus

from bench import heads


@pytest.mark.parametrize(
    ("more", "num_ways"),
    [
        (["--backends", "grouped", "sdpa"], 8),
        (["--kind", "paragraphs", "--architecture", "modernbert"], 6),
        (["--kind", "packed", "--deepspeed", "ds_configs/zero1.json"], 3),
    ],
)
def test_step_bench_prints_every_way(more: list[str], num_ways: int, tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text.jsonl", 600)
    arguments = ["--length", "64", "--rows", "4", "--steps", "3", "--hidden", "64",
                 "--layers", "2", "--vocab-size", "350", *more]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "bench.step", str(text), *arguments],
        cwd=ROOT,
        env={**environment(), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output = done.stdout
    rates = re.findall(
        r"^\| (?:cloze|transformers)[^|]* \| ([\d,]+) \|", output, flags=re.MULTILINE
    )
    assert len(rates) == num_ways and all(int(rate.replace(",", "")) > 0 for rate in rates)
    shares = re.findall(r"^\| [a-z][^|]* \| ([\d.]+)% \|$", output, flags=re.MULTILINE)
    assert sum(map(float, shares)) == pytest.approx(100, abs=1)


def test_every_way_to_the_loss_agrees() -> None:
    lines = heads.heads_table(vocab_size=5000, num_tokens=4096, hidden_size=16)
    losses = [float(line.split("|")[4]) for line in lines[2:]]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] == pytest.approx(losses[2], rel=0.02)  # of other rows


def test_records_name_hardware_versions_commit_and_command() -> None:
    records = list((ROOT / "bench" / "records").glob("*.md"))
    assert records
    for path in records:
        text = path.read_text(encoding="utf-8")
        for part in ("Hardware:", "Software:", "Commit ", "python -m "):
            assert part in text, (path.name, part)
