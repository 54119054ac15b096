"""cloze probe on a small real run: what it finds is true, is written once, and new checkpoints are followed."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support import OBJECTS, PLACES, ROOT, VERBS, environment, launch, pick, tiny_preset
from test_launcher_status import held, shown

from data.labelled import read_tasks
from launcher.probe import probe_run
from launcher.probe_file import ProbeFile
from launcher.probe_lines import read_probes
from launcher.probe_scores import accuracy, macro_f1, majority_class, matthews, wilson_interval

__all__ = ["held"]
SUBJECTS = ("the river", "the old clock")
PROBES = [("linear", "mean"), ("knn", "mean"), ("linear", "cls"), ("knn", "cls")]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("probed")
    preset = tiny_preset(folder, tiny_dataset, steps=6)
    done = launch(preset)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In "subject" the label follows from a word, in "cola" from nothing, and 2 of 3 rows have label 1."""
    folder = tmp_path_factory.mktemp("labelled")
    for split, numbers in (("train", range(240)), ("dev", range(1000, 1150))):
        subject, nothing = ["sentence\tlabel"], ["sentence\tlabel"]
        for n in numbers:
            words = [SUBJECTS[n % 2], *(pick(c, "probe", n, c) for c in (VERBS, OBJECTS, PLACES))]
            subject.append(f"{' '.join(words)}\t{'clock' if n % 2 else 'river'}")
            nothing.append(f"{' '.join(words)}\t{pick('0|1|1', 'nothing', n)}")
        for task, rows in (("subject", subject), ("cola", nothing)):
            (folder / task).mkdir(exist_ok=True)
            (folder / task / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


def options(run: Path, **chosen: object) -> argparse.Namespace:
    given = {"step": None, "newest": False, "watch": False, "every": 0.1, **chosen}
    return argparse.Namespace(source=run, **given)


def probe(run: Path, labelled: Path, **chosen: object) -> int:
    return probe_run(options(run, **chosen), read_tasks(labelled, {}, 10_000)[0])


def cloze(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", "probe", *map(str, arguments)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_what_is_there_is_found_and_what_is_not_is_not(
    run: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert probe(run, labelled) == 0
    told = capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in before} == before  # nothing of the run is touched
    lines = read_probes(run)
    assert [(line["step"], line["task"], line["probe"], line["features"]) for line in lines] == [
        (step, task, *which) for step in (3, 6) for task in ("cola", "subject") for which in PROBES
    ]
    assert len({line["weights"] for line in lines}) == 2
    for line in lines:
        assert (line["num_train"], line["num_evaluated"], line["num_classes"]) == (240, 150, 2)
        assert line["interval"][0] <= line["accuracy"] <= line["interval"][1]
        if line["task"] == "cola":  # labels that follow from nothing: Matthews' correlation about 0
            assert line["metric"] == "matthews" and line["majority_score"] == 0
            assert abs(line["score"]) < 0.25
            assert line["interval"][0] < line["majority_accuracy"]
        elif line["features"] == "mean":
            assert line["metric"] == "accuracy" and line["majority_accuracy"] == 0.5
            assert line["accuracy"] > (0.99 if line["probe"] == "linear" else 0.8)
    tokens = {line["step"]: line["num_tokens"] for line in lines}
    for step, num_tokens in tokens.items():
        state = json.loads((run / f"checkpoints/step-{step:08d}/state.json").read_text())
        assert state["num_tokens"] == num_tokens
    assert "majority class" in told and "subject" in told
    text = shown(run, capsys)
    assert "linear probes at step 6: cola" in text and "subject 100.0% right" in text


def test_it_is_drawn_against_tokens_beside_the_run_s_own_curves(run: Path, labelled: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    probe(run, labelled, newest=True)
    events = EventAccumulator(str(run / "tensorboard" / "probes"))
    events.Reload()
    (line,) = (
        line
        for line in read_probes(run)
        if (line["task"], line["probe"], line["features"]) == ("cola", "knn", "cls")
    )
    (point,) = events.Scalars("probe/cola/knn_cls_matthews")
    assert (point.step, point.value) == (line["num_tokens"], pytest.approx(line["score"]))
    assert events.Scalars("probe/cola/majority_class")[0].step == line["num_tokens"]


def test_what_was_probed_is_not_probed_again(
    run: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a kill in the middle of a line; with another task; and of the same step with other weights."""
    probe(run, labelled)
    path = run / "probes.jsonl"
    whole = path.read_bytes()
    probe(run, labelled)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-40])
    probe(run, labelled)
    lines = read_probes(run)
    assert lines[-4:] == [json.loads(line) for line in whole.splitlines()[-4:]]  # the same numbers
    assert len(lines) == 15 + 4

    more = shutil.copytree(labelled, tmp_path / "more")
    with (more / "cola" / "dev.tsv").open("a") as file:
        file.write("the river\t1\n")
    capsys.readouterr()
    probe(run, more, step=6)
    assert [line["task"] for line in read_probes(run)[19:]] == ["cola"] * 4
    assert "151 of dev" in capsys.readouterr().out

    swapped = run / "checkpoints" / "step-00000006"
    shutil.rmtree(swapped)
    shutil.copytree(run / "checkpoints" / "step-00000003", swapped)
    manifest = json.loads((swapped / "MANIFEST.json").read_text())
    assert probe(run, labelled, step=6) == 0  # these weights are known
    assert len(read_probes(run)) == 23
    manifest["files"]["hf/model.safetensors"]["sha256"] = "0" * 64
    (swapped / "MANIFEST.json").write_text(json.dumps(manifest))
    assert probe(run, labelled, step=6) == 1
    assert "cannot be probed: hf/model.safetensors has sha256" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no checkpoint of step 5: there are 3, 6"):
        probe(run, labelled, step=5)
    with ProbeFile(run), pytest.raises(ValueError, match="another `cloze probe`"):
        probe(run, labelled)


@contextmanager
def watching(run: Path, labelled: Path, log: Path) -> Iterator[subprocess.Popen]:
    command = [
        sys.executable,
        "-m",
        "launcher.cli",
        "probe",
        run,
        labelled,
        "--watch",
        "--every",
        "0.1",
    ]
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment(), stdout=file, stderr=file
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_until(condition: Callable[[], bool], log: Path) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def test_a_run_under_way_is_followed(run: Path, labelled: Path, tmp_path: Path) -> None:
    """A checkpoint that appears is probed, in a process that lets others go first, until the run is over."""
    last, aside, log = run / "checkpoints" / "step-00000006", tmp_path / "aside", tmp_path / "log"
    last.rename(aside)
    with watching(run, labelled, log) as process:
        with held(run):
            wait_until(lambda: len(read_probes(run)) == 8, log)
            assert {line["step"] for line in read_probes(run)} == {3}
            assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
            aside.rename(last)
            wait_until(lambda: len(read_probes(run)) == 16, log)
            assert process.poll() is None
        wait_until(lambda: process.poll() is not None, log)
    assert process.returncode == 0
    assert "linear probe on mean-pooled features" in log.read_text()


def test_a_model_s_folder(trained: Path, labelled: Path, tmp_path: Path) -> None:
    """By the command line; the figures are those of the run's last checkpoint, and nothing is written."""
    model = shutil.copytree(trained / "checkpoints" / "step-00000006" / "hf", tmp_path / "model")
    (shutil.copytree(labelled, tmp_path / "more") / "ner").mkdir()
    (tmp_path / "more" / "ner" / "train.conll").write_text("He\tO\n")
    done = cloze(model, tmp_path / "more")
    assert done.returncode == 0, done.stderr
    assert "ner is left out: labels of tokens" in done.stdout
    assert "subject: label of sentence, 2 classes, 240 rows of train, 150 of dev" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["subject", "linear", "mean", "100.0%", "97.5%", "to", "100.0%", "*"] in [
        r[:8] for r in rows
    ]
    assert not (model / "probes.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tmp}", "{labelled}"], "is neither a run (config.yaml) nor a model (config.json)"),
        (["{model}", "{labelled}", "--newest"], "--step, --newest and --watch are of a run"),
        (["{run}", "{tmp}"], "cannot be probed with"),
        (["{run}", "{labelled}", "--columns", "cola=label"], "give TASK=LABEL,TEXT"),
        (["{run}", "{labelled}", "--max-rows", "2"], "--max-rows 2 is below 10"),
        (
            ["{run}", "{labelled}", "--threads", "0", "--every", "0"],
            "--every 0.0 is below 0.01; --threads 0 is below 1",
        ),
    ],
)
def test_what_cannot_be_done(
    arguments: list[str], said: str, trained: Path, labelled: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from launcher.cli import main

    places = {"tmp": tmp_path, "labelled": labelled, "run": trained}
    places["model"] = trained / "checkpoints" / "step-00000003" / "hf"
    assert main(["probe", *(word.format(**places) for word in arguments)]) == 78
    assert said in capsys.readouterr().err


def test_scores_against_other_implementations() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the judge")
    rng = np.random.default_rng(1)
    for num_classes in (2, 5):
        true = rng.integers(0, num_classes, 200)
        guessed = np.where(rng.random(200) < 0.5, true, rng.integers(0, num_classes, 200))
        assert matthews(guessed, true) == pytest.approx(metrics.matthews_corrcoef(true, guessed))
        assert macro_f1(guessed, true) == pytest.approx(
            metrics.f1_score(true, guessed, average="macro")
        )
    assert matthews(np.ones(5, int), np.array([0, 1, 1, 0, 1])) == 0
    assert accuracy(np.array([0, 1]), np.array([0, -1])) == 0.5
    assert majority_class(np.array([2, 0, 0, 2, 1])) == 0


def test_the_interval_covers_95_percent() -> None:
    """Of all outcomes of 100 rows, weighed by their probability, at several true shares."""
    for share in (0.1, 0.5, 0.9):
        covered = sum(
            math.comb(100, right) * share**right * (1 - share) ** (100 - right)
            for right in range(101)
            if wilson_interval(right / 100, 100)[0] <= share <= wilson_interval(right / 100, 100)[1]
        )
        assert 0.93 < covered < 0.97
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(1, 10)[1] == pytest.approx(1)
