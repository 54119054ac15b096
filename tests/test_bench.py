"""The benchmarks of the model run from end to end, at a size that says nothing about speed."""

import re
from pathlib import Path

import pytest
from support import ROOT, write_corpus

from bench import heads, step


def test_step_bench_prints_every_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_corpus(tmp_path / "text.jsonl", 600)
    arguments = [str(text), "--length", "64", "--rows", "4", "--steps", "3", "--hidden", "32",
                 "--layers", "2", "--vocab-size", "350", "--backends", "grouped", "sdpa"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["bench.step", *arguments])
    step.main()
    output = capsys.readouterr().out
    ways = re.findall(
        r"^\| ((?:cloze|transformers)[^|]*) \| ([\d,]+) \|", output, flags=re.MULTILINE
    )
    assert len(ways) == 8 and all(int(rate.replace(",", "")) > 0 for _, rate in ways)
    defaults = next(
        line for line in output.splitlines() if "its defaults |" in line and "1.00 x" in line
    )
    assert defaults.count("x") >= 2
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
