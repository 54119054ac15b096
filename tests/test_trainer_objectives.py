"""Runs of many objectives: killed, on other ranks, through phases, and what a preset may not ask for."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from support import ROOT, launch, read_metrics, tiny_preset, write_corpus
from test_model_tasks import with_tasks
from test_trainer_resume import reached, start_and_kill

from data.batch import Reader, build_loader
from data.lanes import StreamState
from data.objectives import TASKS, read_mixture
from data.prepare import PrepareConfig, prepare
from data.shards import Dataset
from launcher import cli
from model.weights import build
from trainer.config import ModelConfig, differences, load_config, to_dict
from trainer.task_losses import DEFAULT_LOSS_WEIGHTS

EVERYTHING = {
    "mlm+nsp": 2, "wwm+sop": 2, "span+order": 4, "ngram+distance": 4, "static_mlm": 1, "rtd": 1, "clm": 1,
    "prefix_lm": 1, "denoise": 1, "mlm+word_order": 1, "mlm+reorder+relative": 2, "mlm+contrastive": 1,
    "mlm+cpc": 1,
}  # fmt: skip
STEPS = 10


def changes(stage: str = "zero2", **more: object) -> dict:
    return {
        "steps": STEPS,
        "global_batch_size": 32,
        "eval_every": 5,
        "data": {"objectives": EVERYTHING, "sequence_length": 128},
        "model": {"generator_divisor": 2, "max_position_embeddings": 128},
        "deepspeed": str(ROOT / "ds_configs" / f"{stage}.json"),
        **more,
    }


def curve(run: Path) -> list[dict]:
    """All that was learned, exactly as floats."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "rows_digest")
    return [
        {k: v for k, v in m.items() if k in kept or k.endswith(("_loss", "_accuracy"))}
        for m in read_metrics(run)
    ]


@pytest.fixture(scope="module")
def whole_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block: what is asked of pairs needs many of them in one place."""
    folder = tmp_path_factory.mktemp("whole")
    text = write_corpus(folder / "text.jsonl", 1000)
    return prepare(
        PrepareConfig(
            output=str(folder / "dataset"), sources={"text": (str(text),)}, vocab_size=360,
            heldout_fraction=0.1,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(whole_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("everything")
    result = launch(tiny_preset(folder, whole_dataset, **changes()), processes=2)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_every_task_has_a_loss(unbroken: Path) -> None:
    seen = {key for m in curve(unbroken) for key in m if key.endswith("_loss")}
    assert seen == {f"{task}_loss" for task in TASKS}
    for m in curve(unbroken):
        expected = sum(
            DEFAULT_LOSS_WEIGHTS.get(key.removesuffix("_loss"), 1.0) * value
            for key, value in m.items()
            if key.endswith("_loss")
        )
        assert m["loss"] == pytest.approx(expected) and math.isfinite(m["loss"])


def test_killed_and_bitwise_the_same(unbroken: Path, whole_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, whole_dataset, **changes())
    start_and_kill(preset, tmp_path / "run", 2, reached(5))
    last = launch(preset, processes=2)
    assert last.returncode == 0, last.stderr
    assert "resuming from" in last.stdout
    assert curve(tmp_path / "run") == curve(unbroken)
    weights = Path("checkpoints") / f"step-{STEPS:08d}" / "hf" / "model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (unbroken / weights).read_bytes()


@pytest.mark.parametrize(("stage", "processes"), [("zero3", 4), ("zero0", 1)])
def test_on_other_ranks_the_rows_are_the_same_and_the_losses_but_for_rounding(
    stage: str, processes: int, unbroken: Path, whole_dataset: Path, tmp_path: Path
) -> None:
    """Ranks whose rows have none of a task take part in its loss all the same: nothing hangs."""
    preset = tiny_preset(tmp_path, whole_dataset, **changes(stage))
    result = launch(preset, processes=processes)
    assert result.returncode == 0, result.stderr
    for ours, theirs in zip(curve(tmp_path / "run"), curve(unbroken), strict=True):
        assert ours.keys() == theirs.keys() and ours["rows_digest"] == theirs["rows_digest"]
        losses = [key for key in ours if key.endswith("loss")]
        assert [ours[k] for k in losses] == pytest.approx([theirs[k] for k in losses], rel=1e-4)


def test_each_task_of_the_multitask_preset_has_the_loss_that_it_has_alone(
    whole_dataset: Path,
) -> None:
    """On the same weights and rows of the preset's own stream."""
    run = load_config(ROOT / "configs" / "multitask.yaml", [f"data.path={whole_dataset}"])
    reader = Reader(0, 1, micro_batch_size=32, global_batch_size=32, seed=run.seed)
    stream = build_loader(run.data, reader, StreamState.start(run.data.num_lanes, 1))
    vocab_size = Dataset.open(whole_dataset).vocab_size
    model = build(run.model, vocab_size, seed=run.seed)
    singles = {task: with_tasks(model, task, vocab_size=vocab_size) for task in run.model.tasks}
    num_compared = dict.fromkeys(singles, 0)
    for item in itertools.islice(stream, 8):
        inputs = item.batch.model_inputs(torch.device("cpu"))
        for task, expected in model(**inputs).items():
            alone = singles[task](**{**inputs, "targets": {task: inputs["targets"][task]}})[task]
            torch.testing.assert_close(alone.loss_sum, expected.loss_sum, rtol=1e-6, atol=1e-6)
            num_compared[task] += int(expected.count)
    assert list(num_compared) == ["mlm", "wwm", "nsp", "sop", "relative"]
    assert min(num_compared.values()) > 10


def test_objectives_and_their_weights_change_with_a_phase(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    phases = [
        {"first_step": 3, "objectives": {"clm": 1}},
        {"first_step": 5, "objectives": {"mlm+nsp": 1}, "loss_weights": {"nsp": 0.5}},
    ]
    preset = tiny_preset(
        tmp_path, tiny_dataset, steps=7, phases=phases, data={"objectives": {"mlm+sop": 1}},
        save_every=2,
    )  # fmt: skip
    assert load_config(preset, []).model.tasks == ("mlm", "clm", "nsp", "sop")
    start_and_kill(preset, tmp_path / "run", 2, reached(4))
    result = launch(preset, processes=2)
    assert result.returncode == 0, result.stderr
    steps = curve(tmp_path / "run")
    found = [{key for key in m if key.endswith("_loss")} for m in steps]
    assert set().union(*found[:3]) == {"mlm_loss", "sop_loss"}
    assert found[3:] == [{"clm_loss"}] * 2 + [{"mlm_loss", "nsp_loss"}] * 2
    assert steps[-1]["loss"] == pytest.approx(steps[-1]["mlm_loss"] + 0.5 * steps[-1]["nsp_loss"])


def test_what_a_preset_may_not_ask_for(tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset)
    for override, said in {
        "data.objectives={mlm+nps: 1}": "'nps' is none of mlm, wwm",
        "data.objectives={mlm+wwm: 1}": "mlm and wwm cannot both hide",
        "data.objectives={clm+nsp: 1}": "[CLS] does not see the text",
        "data.objectives={nsp+sop: 1}": "lay a row out differently",
        "data.objectives={mlm+nsp: 0}": "gives no recipe any rows",
        "data.objectives={mlm+nsp: -1}": "give an integer in 0 to",
        "data.objectives={rtd: 1}": "generator_divisor",
        "loss_weights={nps: 1.0}": "there is no such task",
        "loss_weights={nsp: -1.0}": "is negative",
        "model.tasks=[mlm]": "leave model.tasks out",
        "data.mask_token_share=0.95": "are not shares of 1",
    }.items():
        with pytest.raises(ValueError) as raised:
            load_config(preset, [override, "model.generator_divisor=3"])
        assert said in str(raised.value), override


def test_a_checkpoint_older_than_objectives_goes_on(tiny_dataset: Path, tmp_path: Path) -> None:
    """Its configuration lacks what is newer; its run had the defaults."""
    config = load_config(tiny_preset(tmp_path, tiny_dataset), [])
    old = json.loads(json.dumps(to_dict(config)))
    del old["loss_weights"], old["model"]["tasks"], old["model"]["generator_divisor"]
    for name in ("objectives", "mask_token_share", "random_token_share"):
        del old["data"][name]
    assert differences(old, to_dict(config)) == []
    assert ModelConfig().tasks == read_mixture({"mlm+nsp": 1}).tasks
    others = load_config(tiny_preset(tmp_path, tiny_dataset, data={"objectives": {"clm": 1}}), [])
    assert "model.tasks: ['mlm', 'nsp'] -> ['clm']" in differences(old, to_dict(others))


def test_evaluate_says_of_every_task_what_the_run_said(
    unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for what depends on which sequences share a micro-batch, and on what a generator has drawn."""
    logged = read_metrics(unbroken, "heldout")[-1]
    assert cli.main(["evaluate", str(unbroken), "--rows", "24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["together"]
    losses = {key for key in logged if key.endswith("_loss")}
    assert losses == {key for key in found if key.endswith("_loss")}
    for key in losses - {"rtd_loss", "contrastive_loss", "cpc_loss"}:
        assert found[key] == pytest.approx(logged[key], rel=1e-4), key
