"""One preset, started in every way there is: the same rows, the same losses, a folder that just loads."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, environment, free_port, launch, read_metrics, tiny_preset

from data.lanes import StreamState
from data.shards import Dataset
from launcher import cli
from model.hf_parity import REPORT_FILE
from model.weights import fresh_weights
from trainer import job
from trainer.config import load_config
from trainer.loop import seed_dropout
from trainer.state import TrainState

LOSSES = ("loss", "mlm_loss", "nsp_loss", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def one_process(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: fp32, ZeRO 0, plain python, a single process. Returns the run's folder."""
    folder = tmp_path_factory.mktemp("reference")
    preset = tiny_preset(folder, tiny_dataset, deepspeed=str(ROOT / "ds_configs" / "zero0.json"))
    result = launch(preset)
    assert result.returncode == 0, result.stderr
    assert "WARN" not in result.stderr and "Warning" not in result.stdout + result.stderr
    return folder / "run"


def assert_same_curve(run: Path, reference: Path, tolerance: float = 1e-5) -> None:
    ours, theirs = read_metrics(run), read_metrics(reference)
    assert [m["step"] for m in ours] == [m["step"] for m in theirs] == list(range(1, 9))
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine["rows_digest"] == expected["rows_digest"]
        assert mine["num_tokens"] == expected["num_tokens"]
        for name in LOSSES:
            assert mine[name] == pytest.approx(expected[name], rel=tolerance), (mine["step"], name)


@pytest.mark.parametrize(
    "stage", ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
)
def test_two_processes_at_any_zero_stage(
    stage: str, one_process: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    """Dropout is on: its masks belong to the rows, not to the ranks."""
    preset = tiny_preset(
        tmp_path, tiny_dataset, deepspeed=str(ROOT / "ds_configs" / f"{stage}.json")
    )
    result = launch(preset, processes=2)
    assert result.returncode == 0, result.stderr
    assert_same_curve(tmp_path / "run", one_process)


def test_the_deepspeed_launcher(one_process: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset)
    deepspeed = Path(sys.executable).with_name("deepspeed")
    command = [deepspeed, "--num_gpus", "2", "--master_port", str(free_port())]
    result = subprocess.run(
        [*command, "--module", "launcher.train", preset],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same_curve(tmp_path / "run", one_process)


def test_cloze_train_starts_several_processes(
    one_process: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    """Four processes, micro-batches made by loader workers, another accumulation: same curve."""
    preset = tiny_preset(tmp_path, tiny_dataset)
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "launcher.cli",
            "train",
            preset,
            "--processes",
            "4",
            "data.num_workers=2",
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert_same_curve(tmp_path / "run", one_process)


def test_a_lock_that_a_killed_compiler_left_is_not_waited_for(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    """DeepSpeed waits for it for ever, without a word; here nothing is compiled at all."""
    left = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    left.parent.mkdir(parents=True)
    left.touch()
    preset = tiny_preset(
        tmp_path, tiny_dataset, deepspeed=str(ROOT / "ds_configs/zero2_offload.json")
    )
    result = launch(preset, processes=2, TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert result.returncode == 0, result.stderr
    assert [p for p in (tmp_path / "extensions").rglob("*") if p.is_file()] == [left]


def test_micro_batch_size_changes_dropout_but_not_the_rows_or_the_loss(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    """Without dropout the curve does not depend on how a step is cut: the loss is a global mean."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for size in (2, 16):
        folder = tmp_path / str(size)
        folder.mkdir()
        result = launch(tiny_preset(folder, tiny_dataset, model=still, micro_batch_size=size))
        assert result.returncode == 0, result.stderr
    assert_same_curve(tmp_path / "2" / "run", tmp_path / "16" / "run")


def test_dropout_belongs_to_a_row_of_a_run() -> None:
    def drawn(seed: int, first_row: int) -> list[float]:
        seed_dropout(seed, first_row, torch.device("cpu"))
        return torch.rand(4).tolist()

    assert drawn(1, 8) == drawn(1, 8)
    assert len({tuple(drawn(seed, row)) for seed in (1, 2) for row in (0, 8, 16)}) == 6


def test_a_checkpoint_whose_export_is_another_model_is_refused(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the saver calls for hf/: the folder is read again, and compared with what was trained."""
    run, dataset = load_config(tiny_preset(tmp_path, tiny_dataset), []), Dataset.open(tiny_dataset)
    state = TrainState(3, 0, 0, StreamState(0, ()))
    weights = dict(fresh_weights(run.model, dataset.vocab_size, seed=1))
    write = job._hf_writer(run, dataset, state)
    write(weights, tmp_path / "right")
    assert json.loads((tmp_path / "right" / REPORT_FILE).read_text())["weights"] == "equal"
    name = "embeddings.word_embeddings.weight"
    export = job.export_hf
    monkeypatch.setattr(
        job,
        "export_hf",
        lambda w, *rest, **named: export({**w, name: w[name] + 1e-6}, *rest, **named),
    )
    with pytest.raises(ValueError, match="does not hold what was trained"):
        write(weights, tmp_path / "wrong")


def test_what_a_run_folder_holds(one_process: Path) -> None:
    checkpoints = sorted(path.name for path in (one_process / "checkpoints").iterdir())
    assert checkpoints == ["step-00000003", "step-00000006", "step-00000008"]
    assert {"config.yaml", "deepspeed.json", "metrics.jsonl", "tensorboard"} <= {
        p.name for p in one_process.iterdir()
    }
    assert (
        json.loads((one_process / "deepspeed.json").read_text())["train_micro_batch_size_per_gpu"]
        == 4
    )
    (heldout,) = read_metrics(one_process, "heldout")
    assert heldout["step"] == 8
    assert 0 < heldout["mlm_loss"] < 2 * math.log(360) and 0 <= heldout["nsp_accuracy"] <= 1


def test_tensorboard_scalars(one_process: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(one_process / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "train/loss", "train/mlm_loss", "train/nsp_loss", "train/mlm_accuracy", "train/nsp_accuracy",
        "train/learning_rate", "train/grad_norm", "train/tokens_per_second",
        "heldout/mlm_loss", "heldout/nsp_accuracy",
    }  # fmt: skip
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    assert logged == {m["step"]: pytest.approx(m["loss"]) for m in read_metrics(one_process)}


def test_transformers_loads_every_checkpoint(one_process: Path, tiny_dataset: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer, BertForMaskedLM, BertForPreTraining

    from model.hf import import_hf
    from model.weights import build

    checkpoint = one_process / "checkpoints" / "step-00000008"
    for kind, unused in (
        (BertForPreTraining, ()),
        (BertForMaskedLM, ("bert.pooler.", "cls.seq_relationship.")),
        (AutoModel, ("cls.",)),
    ):
        _, info = kind.from_pretrained(
            checkpoint / "hf", dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["mismatched_keys"]
        # heads that a class does not have: `cloze export --as` leaves them out
        assert all(name.startswith(unused) for name in info["unexpected_keys"])
    theirs = BertForPreTraining.from_pretrained(checkpoint / "hf", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "hf")
    dataset = Dataset.open(tiny_dataset)
    assert len(tokenizer) == dataset.vocab_size
    encoded = tokenizer(
        "The river watched the long road.", "Seven small boats.", return_tensors="pt"
    )
    weights, config, vocab_size = import_hf(checkpoint / "hf")
    ours = build(config, vocab_size, dataset.special_ids["[PAD]"]).eval()
    masters: dict[str, torch.Tensor] = {}
    for path in checkpoint.glob("train_state-*.safetensors"):
        masters |= {
            k.removeprefix("master/"): v
            for k, v in load_file(path).items()
            if k.startswith("master/")
        }
    assert masters.keys() == weights.keys()
    assert all(torch.equal(masters[name], weights[name]) for name in weights)
    ours.load_state_dict(
        {**weights, "mlm_head.decoder.weight": weights["embeddings.word_embeddings.weight"]}
    )
    ids, types = encoded["input_ids"], encoded["token_type_ids"]
    with torch.no_grad():
        expected = theirs(**encoded)
        hidden = ours.encode(ids, types, torch.arange(ids.shape[1])[None], torch.zeros_like(ids))
    torch.testing.assert_close(
        ours.mlm_logits(hidden), expected.prediction_logits, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        ours.nsp_logits(hidden[:, 0]), expected.seq_relationship_logits, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("kind", ["pretraining", "masked-lm", "encoder"])
def test_export_for_one_class(kind: str, one_process: Path, tmp_path: Path) -> None:
    """Neither a missing nor an unexpected weight, and what the class computes is the same."""
    from transformers import AutoModel, AutoTokenizer, BertForMaskedLM, BertForPreTraining

    loader = {
        "pretraining": BertForPreTraining,
        "masked-lm": BertForMaskedLM,
        "encoder": AutoModel,
    }[kind]
    command = ["export", str(one_process), str(tmp_path / "out"), "--as", kind]
    assert cli.main(command) == 0
    model, info = loader.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    whole = loader.from_pretrained(one_process / "checkpoints" / "step-00000008" / "hf")
    encoded = AutoTokenizer.from_pretrained(tmp_path / "out")("The old clock.", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model.eval()(**encoded)[0], whole.eval()(**encoded)[0])
    assert cli.main(command) == 78  # the folder is taken


def test_fill_mask_pipeline(one_process: Path) -> None:
    from transformers import pipeline

    fill = pipeline("fill-mask", model=str(one_process / "checkpoints" / "step-00000008" / "hf"))
    answers = fill("The river [MASK] the long road near the harbour.")
    assert len(answers) == 5 and all(0 <= answer["score"] <= 1 for answer in answers)


def test_a_run_can_start_from_a_hugging_face_folder(
    one_process: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    """The trained model's first loss, on the rows that the fresh one began with, is where it stopped."""
    hf = one_process / "checkpoints" / "step-00000008" / "hf"
    preset = tiny_preset(tmp_path, tiny_dataset, steps=3, init_from=str(hf))
    result = launch(preset)
    assert result.returncode == 0, result.stderr
    first = read_metrics(tmp_path / "run")[0]
    fresh, trained = read_metrics(one_process)[0], read_metrics(one_process, "heldout")[0]
    assert first["rows_digest"] == fresh["rows_digest"]
    assert abs(first["mlm_loss"] - trained["mlm_loss"]) < abs(first["mlm_loss"] - fresh["mlm_loss"])
    result = launch(preset, "dir=" + str(tmp_path / "other"), "model.num_hidden_layers=1")
    assert result.returncode == 78
    assert "its num_hidden_layers is 2, model.num_hidden_layers is 1" in result.stderr
