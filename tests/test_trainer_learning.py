"""Runs that are broken, and one that is well, by real processes: what their logs and `cloze status` say."""

import json
import random
from pathlib import Path

import pytest
from support import FAULTY, ROOT, document, launch, read_metrics, tiny_preset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer_resume import reached, start_and_kill

from data.prepare import PrepareConfig, prepare
from launcher import cli

STEPS = 200


def texts(numbers: range) -> list[str]:
    """English ones."""
    return [document(n) for n in numbers if n % 7]


def without_order(text: str) -> str:
    characters = list(text)
    random.Random(text).shuffle(characters)
    return "".join(characters)


def dataset_of(folder: Path, documents: list[str], **options: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": f"{n}", "text": text}) for n, text in enumerate(documents)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings: dict = {"vocab_size": 300, "heldout_fraction": 0.1, "num_processes": 1, **options}
    sources = {"text": (str(folder / "text.jsonl"),)}
    return prepare(PrepareConfig(output=str(folder / "dataset"), sources=sources, **settings))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset_of(tmp_path_factory.mktemp("text"), texts(range(1500)))


def preset(folder: Path, dataset: Path, **changes: object) -> Path:
    """A run that learns to use context within 200 steps."""
    own = {
        "steps": STEPS, "eval_every": 40, "eval_rows": 128, "log_every": 20, "save_every": 100,
        "micro_batch_size": 16, "stuck_after_steps": 100,
        "deepspeed": str(ROOT / "ds_configs" / "zero0.json"),
        "data": {"objectives": {"mlm": 1}},
        "model": {
            "architecture": "modernbert", "hidden_size": 64, "intermediate_size": 128, "attention": "auto",
            "layer_norm_eps": 1e-5, "global_attention_every": 1, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 64,
        },
        "optim": {"name": "muon", "learning_rate": 1e-2, "warmup_steps": 10},
    }  # fmt: skip
    return tiny_preset(folder, dataset, **{**own, **changes})


def trained(preset: Path, **variables: str) -> str:
    """A run's log."""
    result = launch(preset, **({"script": FAULTY} if variables else {}), **variables)  # type: ignore[arg-type]
    assert result.returncode == 0, result.stderr
    return result.stdout


def warnings(run: Path, what: str = "learning") -> list[str]:
    lines = (run / "jobs.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["message"] for line in lines if (event := json.loads(line)).get("what") == what]


def status(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(["status", str(run)]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def well(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("well")
    log = trained(preset(folder, dataset))
    return folder / "run", log


def test_a_run_that_is_well(well: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    run, log = well
    assert warnings(run) == [] and warnings(run, "text") == []
    assert "so far: mlm not yet better than guessing frequent words (" in log
    assert "so far: mlm uses context (" in log
    assert "uses context" in status(run, capsys)


def test_tensorboard_draws_it_beside_guessing(well: tuple[Path, str]) -> None:
    run, _ = well
    drawn = EventAccumulator(str(run / "tensorboard")).Reload()
    guessed = drawn.Scalars("guessing/mlm_loss")
    heldout = read_metrics(run, "heldout")
    assert [s.step for s in guessed] == [line["step"] for line in heldout]
    assert guessed[0].value == pytest.approx(heldout[0]["guessing"]["mlm"]["context free"][0])
    assert "custom_scalars__config__" in drawn.Tags()["tensors"]


def test_no_learning_rate(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 itself is refused before anything begins."""
    optim = {"name": "muon", "learning_rate": 1e-12, "warmup_steps": 10}
    log = trained(preset(tmp_path, dataset, optim=optim))
    (warning,) = warnings(tmp_path / "run")
    assert warning.startswith("mlm: ") and "not yet as good as guessing frequent words" in warning
    assert "far too low" in warning and "learning at step 160: mlm:" in log
    shown = status(tmp_path / "run", capsys)
    assert "not yet as good as guessing frequent words" in shown and "far too low" in shown
    result = launch(preset(tmp_path, dataset, optim={**optim, "learning_rate": 0.0}))
    assert (
        result.returncode == 78 and "learning_rate is 0: nothing would be learned" in result.stderr
    )


def test_labels_that_do_not_follow_from_the_text(dataset: Path, tmp_path: Path) -> None:
    trained(preset(tmp_path, dataset), SHUFFLED_LABELS="1")
    (warning,) = warnings(tmp_path / "run")
    assert "not yet better than guessing frequent words" in warning
    assert "nothing unusual" in warning and "Labels that do not follow from the text" in warning


def test_a_text_in_no_order(tmp_path: Path) -> None:
    documents = [without_order(text) for text in texts(range(1500))]
    trained(preset(tmp_path, dataset_of(tmp_path, documents)))
    assert any(
        "words of this text are in no order" in warning for warning in warnings(tmp_path / "run")
    )


def test_a_text_that_is_there_again_and_again(tmp_path: Path) -> None:
    documents = texts(range(60)) * 30
    log = trained(preset(tmp_path, dataset_of(tmp_path, documents), steps=20))
    (warning,) = warnings(tmp_path / "run", "text")
    assert warning.startswith("copies of text: 9") and "Was a file given twice" in warning
    assert "text at step 0: copies of text" in log


def test_few_texts_are_learnt_by_heart(tmp_path: Path) -> None:
    """Copies in the training text, and others held out."""
    documents = texts(range(24))
    dataset = dataset_of(tmp_path, documents, heldout_fraction=0.3)
    trained(preset(tmp_path, dataset, steps=400, data={"objectives": {"static_mlm": 1}}))
    assert any("it learns by heart" in warning for warning in warnings(tmp_path / "run"))


def test_a_tokenizer_of_another_language(dataset: Path, tmp_path: Path) -> None:
    documents = [document(n) for n in range(0, 7 * 400, 7)]  # Chinese ones
    other = dataset_of(tmp_path, documents, tokenizer=str(dataset / "tokenizer"))
    log = trained(preset(tmp_path, other, steps=20))
    (warning,) = warnings(tmp_path / "run", "text")
    assert "tokenizer was made for another language" in warning or "[UNK]" in warning
    assert "text at step 0:" in log


def test_a_warning_outlives_a_kill(dataset: Path, tmp_path: Path) -> None:
    """The job that goes on knows the evaluations of the one before it, and looks at the text no more."""
    optim = {"name": "muon", "learning_rate": 1e-12, "warmup_steps": 10}
    path = preset(tmp_path, dataset, optim=optim, save_every=40)
    start_and_kill(path, tmp_path / "run", 1, reached(5))  # lines, one for 20 steps
    result = launch(path)
    assert result.returncode == 0 and "resuming from" in result.stdout, result.stderr
    (warning,) = warnings(tmp_path / "run")
    assert "since step 40" in warning


def test_evaluations_by_source(tiny_dataset: Path, tmp_path: Path) -> None:
    """Sums over sources are those over all rows, on one rank as on two."""
    lines = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        path = tiny_preset(folder, tiny_dataset, steps=3, eval_every=1, eval_rows=100)
        assert launch(path, processes=processes).returncode == 0
        lines.append(read_metrics(folder / "run", "heldout"))
    for one, two in zip(*lines, strict=True):
        assert list(one["sources"]) == ["first", "second"]
        for task in ("mlm", "nsp"):
            counts = [values[f"num_{task}_labels"] for values in one["sources"].values()]
            losses = [values[f"{task}_loss"] for values in one["sources"].values()]
            assert sum(counts) == one[f"num_{task}_labels"] and min(counts) > 0
            weighted = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)
            assert one[f"{task}_loss"] == pytest.approx(weighted, rel=1e-9)
            assert one[f"{task}_loss"] == pytest.approx(two[f"{task}_loss"], rel=1e-4)
        assert one["guessing"] == two["guessing"]
