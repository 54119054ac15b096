"""The benchmarks of the model run from end to end, at a size that says nothing about speed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, environment, read_metrics, tiny_preset, write_corpus

from bench import heads, scale


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


def test_scale_divides_what_can_be_divided(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says from where on the preset is refused, as the trainer would."""
    monkeypatch.setattr("sys.argv", ["bench.scale", str(ROOT / "configs/modern_1b.yaml")])
    scale.main()
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:1] == ["8"])
    rows = [line.split() for line in lines[first : first + 10]]
    assert [row[0].rstrip("*") for row in rows] == [f"{8 << n:,}" for n in range(10)]
    assert [row[0].endswith("*") for row in rows] == [False] * 5 + [True] * 5
    assert [int(row[1]) * (8 << n) for n, row in enumerate(rows[:5])] == [1152] * 5  # lanes
    assert any("256 ranks do not divide" in line for line in lines)


def test_an_ablation_goes_on_where_it_was_and_its_curves_become_references(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    """Two mixtures and the network before its first step, on one labelled set; then all of it again."""
    lines = [f"{'is' if n % 2 else 'was'} {n}\t{n % 2}" for n in range(60)]
    for part in ("train", "dev"):
        path = tmp_path / "labelled" / "tense" / f"{part}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
    preset = tiny_preset(tmp_path, tiny_dataset, steps=4, eval_every=1, save_every=0)
    arguments = [
        "bench.ablation", preset, tiny_dataset, tmp_path / "labelled", tmp_path / "out",
        "--mixtures", "untrained", "mlm+sop", "mlm=2,clm=1", "--seeds", "1",
    ]  # fmt: skip
    outputs = []
    for _ in range(2):
        done = module(*arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] and len(list(tmp_path.glob("out/*/seed-1/jobs.jsonl"))) == 3
    for run in tmp_path.glob("out/*/seed-1"):
        starts = (run / "jobs.jsonl").read_text(encoding="utf-8").count('"start"')
        assert starts == 1, run
    rows = re.findall(r"^\| (\S.*?) \| (\w+) \|.*\| ([\d,]+) \|$", outputs[0], flags=re.MULTILINE)
    tasks = [(mixture, task) for mixture, task, _ in rows if task in ("mlm", "sop", "clm")]
    assert tasks == [
        ("mlm+sop", "mlm"),
        ("mlm+sop", "sop"),
        ("mlm=2, clm=1", "mlm"),
        ("mlm=2, clm=1", "clm"),
    ]
    probes = re.findall(
        r"^\| (untrained|mlm\+sop|mlm=2, clm=1) \| 1 \| ([\d.]+) \|$", outputs[0], re.MULTILINE
    )
    assert len(probes) == 6 and all(0 <= float(score) <= 100 for _, score in probes)

    assert module(*arguments, "--tables").stdout == outputs[0]
    refused = module(*arguments[:5], "--mixtures", "mlm", "steps=3")
    assert refused.returncode == 2 and "give key=value before --mixtures" in refused.stderr

    run = tmp_path / "out" / "mlm+sop" / "seed-1"
    done = module("bench.reference_curves", run, "--marks", "1500", "2500")
    assert done.returncode == 0, done.stderr[-3000:]
    written: dict = {}
    exec(done.stdout, written)
    marks = written["REFERENCE"]["mlm"]
    assert [mark for mark, _, _ in marks] == [1500, 2500]
    heldout = read_metrics(run, "heldout")
    shares = [line["mlm_loss"] / line["guessing"]["mlm"]["context free"][0] for line in heldout]
    assert all(min(shares) <= low == high <= max(shares) for _, low, high in marks)


def module(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
