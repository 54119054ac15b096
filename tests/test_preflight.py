"""What a user gets wrong is told before the first step: key or file, the values, and the right status (G21)."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, tiny_preset

from data.files import folder_digest
from data.manifest import sealed
from model.hf import export_hf
from model.weights import fresh_weights
from trainer import start
from trainer.config import load_config, to_yaml
from trainer.exit_status import CONFIG, STORAGE, exit_status_of
from trainer.run_folder import own
from trainer.start import prepare
from trainer.world import World

Change = Callable[
    [Path, dict[str, Any]], None
]  # of a folder with a dataset in it, and of a preset in it


def outcome(preset: Path, *overrides: str, ranks: int = 1) -> tuple[int, str]:
    """(exit status, message) of a start up to the point where the engine is made; 0 for a right one."""
    world = World(0, ranks, 0, torch.device("cpu"))
    try:
        with ExitStack() as stack:
            prepare(load_config(preset, list(overrides)), world, stack)
    except Exception as error:
        return exit_status_of(error), str(error)
    return 0, ""


@pytest.fixture
def folder(tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands are given: with a dataset, and a DeepSpeed JSON."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset").symlink_to(tiny_dataset)
    shutil.copy(ROOT / "ds_configs" / "zero2.json", tmp_path / "ds.json")
    return tmp_path


def test_the_preset_itself_is_right(folder: Path) -> None:
    assert outcome(tiny_preset(folder, folder / "dataset")) == (0, "")


# override -> what the message says of it
VALUES = {
    "steps=0": "steps 0 is below 1",
    "steps=-5": "steps -5 is below 1",
    "steps=many": "steps must be int, got 'many'",
    "steps=1.5": "steps must be int, got 1.5",
    "steps=null": "steps must be int, got None",
    "stpes=5": "unknown key stpes (did you mean 'steps'?)",
    "optim.lr=1e-4": "unknown key optim.lr",
    "optim.learning_rate=fast": "optim.learning_rate must be float, got 'fast'",
    "optim.learning_rate=0": "optim.learning_rate is 0: nothing would be learned",
    "optim.learning_rate=-1": "optim.learning_rate -1.0 is negative",
    "optim.learning_rate=.nan": "optim.learning_rate must be float, got nan",
    "optim.name=adamx": "optim.name must be one of adamw, lamb, muon, got 'adamx'",
    "optim.schedule=step": "optim.schedule must be one of",
    "optim.warmup_steps=8": "optim.warmup_steps 8 is not below steps 8",
    "optim.beta2=1.0": "beta2 1.0 must be below 1",
    "optim.clip_norm=-1": "optim.clip_norm -1.0 is negative",
    "optim.ema_decay=1.5": "optim.ema_decay 1.5 is not between 0 and 1",
    "optim.eps=0": "optim.eps is 0",
    "optim.weight_decay=lots": "optim.weight_decay must be float",
    "precision=fp16": "precision must be one of bf16, fp32, got 'fp16'",
    "global_batch_size=18": "global_batch_size 18 is not a multiple of micro_batch_size 4 x 1 ranks = 4",
    "global_batch_size=24": "global_batch_size 24 and data.num_lanes 16: one must divide the other",
    "micro_batch_size=32": "global_batch_size 16 is not a multiple of micro_batch_size 32",
    "micro_batch_size=0": "micro_batch_size 0 is below 1",
    "data.num_lanes=0": "data.num_lanes 0 is below 1",
    "data.num_lanes=10": "global_batch_size 16 and data.num_lanes 10: one must divide the other",
    "data.masked_fraction=15": "data.masked_fraction 15.0 is not between 0 and 1",
    "data.masked_fraction=0": "data.masked_fraction 0.0 is not between 0 and 1",
    "data.sequence_length=128": "data.sequence_length 128 is over model.max_position_embeddings 64",
    "data.sequence_length=4": "data.sequence_length 4 is not in 8 to 65536",
    "data.path=nowhere": "nowhere is not a folder: no complete dataset is there",
    "data.path=ds.json": "ds.json is not a folder",
    "data.path=https:/host/set": "has one slash where a URL has two",
    "data.weights={third: 1}": "data.weights names ['third']",
    "data.weights={first: 0}": "data.weights.first is 0",
    "data.weights={first: 0.5}": "data.weights must be",
    "data.weights={}": "data.weights is empty",
    "data.num_workers=-1": "data.num_workers -1 is negative",
    "data.storage.timeout_seconds=0": "storage.timeout_seconds is 0",
    "data.storage.num_retrys=3": "unknown key data.storage.num_retrys (did you mean 'num_retries'?)",
    "model.hidden_size=33": "hidden_size 33 is not a multiple of num_attention_heads 2",
    "model.num_hidden_layers=0": "num_hidden_layers 0 is below 1",
    "model.hidden_dropout_prob=1.5": "hidden_dropout_prob 1.5 is not in [0, 1)",
    "model.attention=flash": "attention 'flash' needs a GPU, this is cpu",
    "model.attention=magic": "model.attention must be one of",
    "model.vocab_size=1000": "unknown key model.vocab_size",
    "model.type_vocab_size=1": "type_vocab_size 1 is below 2",
    "deepspeed=nowhere.json": "nowhere.json does not exist",
    "deepspeed=dataset": "dataset cannot be read",
    "init_from=nowhere": "nowhere has no config.json",
    "init_from=dataset": "dataset has no config.json",
    "save_every=-1": "save_every -1 is negative",
    "keep_checkpoints=1": "keep_checkpoints 1 is below 2",
    "keep_every=5": "keep_every 5 is not a multiple of save_every 3",
    "log_every=0": "log_every 0 is below 1",
    "eval_rows=0": "eval_rows 0 is below 1",
    "time_limit_minutes=-1": "time_limit_minutes -1 is not above 0",
    "time_limit_minutes=0": "time_limit_minutes 0 is not above 0",
    "hang_timeout_seconds=0": "hang_timeout_seconds 0.0 is below 1",
    "guard.window=1": "guard.window 1 is below 10",
    "guard.rewind_sigmas=2": "guard.rewind_sigmas 2.0",
    "phases=[{first_step: 0}]": "phases: first_step 0 is below 1",
    "phases=[{first_step: 5}, {first_step: 3}]": "phases begin at steps [5, 3]: they must ascend",
    "phases=[{first_step: 9}]": "phases begin at steps [9]: they must ascend, and stay below steps 8",
    "phases=[{first_step: 2, sequence_length: 512}]": "data.sequence_length 512 is over",
    "phases=[{first_step: 2, global_batch_size: 17}]": "global_batch_size 17",
    "phases=[{first_step: 2, global_batch_size: 0}]": "global_batch_size 0 is below 1",
    "phases=[{first_step: 2, micro_batch_size: -4}]": "micro_batch_size -4 is below 1",
    "phases=[{first_step: 2, masked_fraction: 2}]": "masked_fraction 2 is not between",
    "phases=[{first_step: 2, weights: {third: 1}}]": "data.weights names ['third']",
    "phases={first_step: 2}": "phases must be a list, got {'first_step': 2}",
    "dir=''": "dir is empty",
    "seed=-1": "seed -1 is negative",
    "verify_hf=maybe": "verify_hf must be one of",
    "data=null": "data must be a mapping, got None",
    "steps": "overrides are key=value, e.g. optim.learning_rate=1e-4; got ['steps']",
}  # fmt: skip


@pytest.mark.parametrize("override", VALUES)
def test_a_wrong_value_is_named_before_the_first_step(override: str, folder: Path) -> None:
    status, said = outcome(tiny_preset(folder, folder / "dataset"), override)
    assert (status, VALUES[override] in said) == (CONFIG, True), said
    assert not (folder / "run" / "config.yaml").exists()


def write(name: str, content: object) -> Change:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda folder, preset: (folder / name).write_text(text) and None


def zero(**more: object) -> dict[str, object]:
    return {"zero_optimization": {"stage": 2, **more}}


def edited_manifest(**changes: object) -> Change:
    def change(folder: Path, preset: dict[str, Any]) -> None:
        path = folder / "dataset" / "manifest.json"
        manifest = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps(sealed(manifest)))

    return change


def without(name: str) -> Change:
    return lambda folder, preset: (folder / name).unlink()


def with_other_tokenizer(folder: Path, preset: dict[str, Any]) -> None:
    (folder / "dataset" / "tokenizer" / "tokenizer.json").write_text("{}")


def without_mask(folder: Path, preset: dict[str, Any]) -> None:
    path = folder / "dataset" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["tokenizer"]["special_ids"]["[MASK]"]
    assert folder_digest(folder / "dataset" / "tokenizer") == manifest["tokenizer"]["digest"]
    path.write_text(json.dumps(sealed(manifest)))


def starting_from(vocab_size: int, **shape: object) -> Change:
    """init_from a model of another vocabulary or shape."""

    def change(folder: Path, preset: dict[str, Any]) -> None:
        model = load_config(
            folder / "preset.yaml", [f"model.{k}={v}" for k, v in shape.items()]
        ).model
        weights = dict(fresh_weights(model, vocab_size, seed=1))
        export_hf(weights, model, vocab_size, folder / "hf", tokenizer_folder=None, model_card=None)
        preset["init_from"] = "hf"

    return change


def starting_from_pickle(folder: Path, preset: dict[str, Any]) -> None:
    starting_from(360)(folder, preset)
    (folder / "hf" / "model.safetensors").rename(folder / "hf" / "pytorch_model.bin")


def run_of_other_settings(folder: Path, preset: dict[str, Any]) -> None:
    (folder / "run").mkdir()
    other = load_config(folder / "preset.yaml", ["seed=7", "optim.learning_rate=0.5"])
    (folder / "run" / "config.yaml").write_text(to_yaml(other))


def another_run_folder(text: str) -> Change:
    def change(folder: Path, preset: dict[str, Any]) -> None:
        (folder / "run").mkdir()
        (folder / "run" / "config.yaml").write_text(text)

    return change


def thesis(folder: Path, preset: dict[str, Any]) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("precious")


DS = "deepspeed: ds.json"
FILES: dict[str, tuple[Change, str]] = {
    "no DeepSpeed object": (write("ds.json", []), f"{DS} holds no JSON object"),
    "broken JSON": (write("ds.json", "{"), f"{DS} cannot be read as JSON"),
    "deep JSON": (write("ds.json", "[" * 100_000), f"{DS} cannot be read as JSON"),
    "no stage": (write("ds.json", {}), f"{DS}: zero_optimization.stage must be 0, 1, 2 or 3"),
    "stage 5": (write("ds.json", zero(stage=5)), "zero_optimization.stage must be 0, 1, 2 or 3"),
    "stage '2'": (write("ds.json", zero(stage="2")), "zero_optimization.stage must be 0, 1, 2 or 3"),
    "stage true": (write("ds.json", zero(stage=True)), "zero_optimization.stage must be"),
    "auto": (write("ds.json", zero(reduce_bucket_size="auto")), 'reduce_bucket_size is "auto"'),
    "a bucket that is text": (
        write("ds.json", zero(reduce_bucket_size="5e8")),
        "zero_optimization.reduce_bucket_size is '5e8', not a whole number from 0 on",
    ),
    "a switch that is text": (
        write("ds.json", zero(overlap_comm="yes")),
        "zero_optimization.overlap_comm is 'yes', not true or false",
    ),
    "offload as text": (
        write("ds.json", zero(offload_optimizer="cpu")),
        "zero_optimization.offload_optimizer is 'cpu', not an object",
    ),
    "optimizer in JSON": (
        write("ds.json", zero() | {"optimizer": {}}), "'optimizer' belongs to the preset (its home is optim)",
    ),
    "batch in JSON": (write("ds.json", zero() | {"train_batch_size": 8}), "its home is global_batch_size"),
    "fp16 in JSON": (write("ds.json", zero() | {"fp16": {}}), "its home is precision"),
    "misspelt": (write("ds.json", {"zero_optimisation": {}}), "did you mean 'zero_optimization'?"),
    "no manifest": (without("dataset/manifest.json"), "has no manifest.json"),
    "no table": (without("dataset/blocks.npy"), "blocks.npy is missing"),
    "a shard is missing": (
        without("dataset/first/train/first-train-000000.tar"), "first-train-000000.tar is missing",
    ),
    "another format": (edited_manifest(format="cloze-shards-v9"), "has format 'cloze-shards-v9'"),
    "another tokenizer": (with_other_tokenizer, "tokenizer/: the digest of its files is"),
    "no mask token": (without_mask, "cannot be trained on: its tokenizer has no [MASK]"),
    "a small vocabulary": (edited_manifest(vocab_size=3), "the id of [SEP] is 3, with a vocabulary of 3"),
    "no entropy": (edited_manifest(unigram_entropy_nats=None), "manifest.json lacks unigram_entropy"),
    "model of another vocabulary": (
        starting_from(400), "init_from hf does not fit: its vocabulary has 400 tokens, the dataset's 360",
    ),
    "model of another shape": (
        starting_from(360, num_hidden_layers=1), "its num_hidden_layers is 1, model.num_hidden_layers is 2",
    ),
    "pickled weights": (starting_from_pickle, "pytorch_model.bin is not read, for unpickling can run code"),
    "another run": (run_of_other_settings, "belongs to a run with other settings: optim.learning_rate: 0.5"),
    "a damaged run": (another_run_folder("{a: ["), "config.yaml is not valid YAML"),
    "a run of something else": (another_run_folder("name: resnet"), "holds no settings of a run"),
    "a foreign folder": (thesis, "holds ['thesis.tex'] and is no run of ours"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", FILES)
def test_a_wrong_file_is_named_before_the_first_step(mistake: str, folder: Path) -> None:
    change, expected = FILES[mistake]
    tiny_dataset = (folder / "dataset").resolve()
    (folder / "dataset").unlink()
    shutil.copytree(tiny_dataset, folder / "dataset")
    path, changes = tiny_preset(folder, folder / "dataset", deepspeed="ds.json"), {}
    change(folder, changes)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    status, said = outcome(path, *(f"{name}={value}" for name, value in changes.items()))
    assert (status, expected in said) == (CONFIG, True), said
    assert all(p.read_bytes() == content for p, content in before.items())


def test_ranks_that_do_not_divide(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "gather", lambda self, value: [value] * self.size)
    preset = tiny_preset(folder, folder / "dataset", micro_batch_size=1, global_batch_size=15)
    status, said = outcome(preset, "data.num_lanes=3", ranks=5)
    assert status == CONFIG and "5 ranks do not divide" in said


def test_a_run_that_is_being_trained(folder: Path) -> None:
    with own(folder / "run"):
        status, said = outcome(tiny_preset(folder, folder / "dataset"))
    assert status == CONFIG and f'"pid": {os.getpid()}' in said


@pytest.mark.parametrize("place", ["ds.json/run", "/proc/run"])
def test_a_folder_that_cannot_be_written(place: str, folder: Path) -> None:
    status, said = outcome(tiny_preset(folder, folder / "dataset"), f"dir={place}")
    assert status == STORAGE and place in said


def test_a_disk_that_is_too_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "free_bytes", lambda path: 1_000_000)
    preset = tiny_preset(folder, folder / "dataset")
    status, said = outcome(preset)
    assert status == STORAGE and "No space left for two checkpoints in" in said
    assert not (folder / "run" / "config.yaml").exists()
    (folder / "run" / "checkpoints" / "step-00000003").mkdir(
        parents=True
    )  # older ones can make room
    assert outcome(preset) == (0, "")


def test_a_server_that_is_down(folder: Path) -> None:
    preset = tiny_preset(
        folder,
        folder / "dataset",
        data={"path": "http://127.0.0.1:9/set", "storage": {"num_retries": 0}},
    )
    status, said = outcome(preset)
    assert status == STORAGE and "http://127.0.0.1:9/set" in said and "storage.num_retries" in said


def test_the_settings_of_a_right_run_are_kept(folder: Path) -> None:
    preset = tiny_preset(folder, folder / "dataset")
    assert outcome(preset) == outcome(preset) == (0, "")
    assert load_config(folder / "run" / "config.yaml", []) == load_config(preset, [])
