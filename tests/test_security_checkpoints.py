"""Checkpoints and model folders that an attacker has planted: refused by name, and nothing of them runs."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import BOMBS, member, pickled, seal, tar_of, write_checkpoint
from support import tiny_preset

from data.vocab import Tokenizer
from launcher.cli import main
from model.hf import export_hf, import_hf
from model.weights import fresh_weights
from trainer.checkpoint import newest_valid
from trainer.checkpoint_files import list_checkpoints, problems_of, read_state
from trainer.config import RunConfig, load_config, to_dict
from trainer.deepspeed_files import load_safely, read_deepspeed
from trainer.run_folder import claim, own
from trainer.saved_tensors import SavedTensors
from trainer.state import TrainState
from trainer.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(tiny_preset(tmp_path, tmp_path), [])


@pytest.fixture
def checkpoint(tmp_path: Path, config: RunConfig) -> Path:
    return write_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000003", to_dict(config))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def resume(run: Path) -> TrainState | None:
    """Read a run's newest checkpoint as a job does before its first step."""
    found = newest_valid(run, ALONE)
    if found is None:
        return None
    document = read_state(found)
    with SavedTensors(found) as saved:
        saved.read("master/a", 0, 4)
    return TrainState.from_json(document)


def test_the_checkpoint_is_sound(checkpoint: Path) -> None:
    state = resume(checkpoint.parent.parent)
    assert state is not None and state.step == 3


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize(
    "name", ["train_state-00000-of-00001.safetensors", "state.json", "MANIFEST.json"]
)
def test_a_pickle_in_the_place_of_a_file(
    name: str, kind: str, checkpoint: Path, canary: Path
) -> None:
    (checkpoint / name).write_bytes(pickled(kind, canary))
    if name != "MANIFEST.json":
        seal(checkpoint)
    with pytest.raises(ValueError, match=name):
        resume(checkpoint.parent.parent)
    assert not canary.exists()


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("name", ["rng_state.pt", "hf/pytorch_model.bin", "optimizer.pkl"])
def test_a_pickle_beside_the_files_is_not_read(
    name: str, kind: str, checkpoint: Path, canary: Path
) -> None:
    (checkpoint / name).write_bytes(pickled(kind, canary))
    assert resume(checkpoint.parent.parent) is not None
    assert not canary.exists()


def test_tensors_that_the_manifest_does_not_name(checkpoint: Path) -> None:
    shutil.copy(
        checkpoint / "train_state-00000-of-00001.safetensors",
        checkpoint / "train_state-00001-of-00001.safetensors",
    )
    (problem,) = problems_of(checkpoint)
    assert "train_state-00001-of-00001.safetensors is not in the manifest" in problem


ESCAPES = ("../../../../etc/passwd", "/etc/passwd", "hf/../../x", "..", ".", "", "a\nb", "a\0b", "hf/a/b",
           "~/x", "$(touch x)", "x" * 300)  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES, ids=range(len(ESCAPES)))
def test_a_manifest_names_files_of_its_folder_only(name: str, checkpoint: Path) -> None:
    path = checkpoint / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    path.write_text(json.dumps(manifest))
    (problem,) = problems_of(checkpoint)
    assert str(path) in problem and "which is no file of a checkpoint" in problem


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "", "null", "[]", '{"format": []}', '{"format": "cloze-checkpoint-v2"}']
)
@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json"])
def test_what_is_no_json_of_ours(name: str, text: str, checkpoint: Path) -> None:
    (checkpoint / name).write_text(text)
    if name != "MANIFEST.json":
        seal(checkpoint)
    with pytest.raises(ValueError, match=r"step-00000003"):
        resume(checkpoint.parent.parent)


STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "step is missing or of another kind": lambda s: s.update(step="3"),
    "optimizer_step is missing": lambda s: s.pop("optimizer_step"),
    "stream is missing": lambda s: s.update(stream=[]),
    "holds no settings of a run": lambda s: s.update(config={}),
    "KeyError 'lanes'": lambda s: s["stream"].pop("lanes"),
    "a state is not laid out": lambda s: s["stream"].update(lanes=[[1]]),
    "unexpected keyword argument": lambda s: s.update(phases=[{"__class__": "os.system"}]),
}


@pytest.mark.parametrize("expected", STATES)
def test_a_state_of_other_kinds(expected: str, checkpoint: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    STATES[expected](state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint)
    with pytest.raises(ValueError, match=expected):
        resume(checkpoint.parent.parent)


@pytest.mark.parametrize(
    "name",
    ["step-0000000x", "step-", "step-00000003\n", "step-00000003; touch x", "step-1e9", "..step-00000009"],
)  # fmt: skip
def test_folders_with_other_names_are_no_checkpoints(name: str, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, checkpoint.with_name(name))
    assert list_checkpoints(checkpoint.parent.parent) == [checkpoint]


@pytest.mark.parametrize("name", ["state.json", "hf/config.json", "hf"])
def test_a_checkpoint_holds_no_links(name: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / name).rename(tmp_path / "elsewhere")
    (checkpoint / name).symlink_to(tmp_path / "elsewhere")
    problems = problems_of(checkpoint)
    assert problems and all("is a symbolic link" in problem for problem in problems)


def of_another_user(link: Path, target: Path) -> None:
    link.symlink_to(target)
    if os.geteuid() != 0:
        pytest.skip("making a link of another user needs root")
    os.lchown(link, 12345, 12345)


@pytest.mark.parametrize(
    "name", ["", "lock", "config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "jobs.jsonl"]
)
def test_links_that_another_user_has_planted_are_not_followed(
    name: str, tmp_path: Path, config: RunConfig
) -> None:
    run, target = Path(config.dir), tmp_path / "precious"
    target.mkdir()
    (target / "file").write_text("precious")
    if name:
        run.mkdir()
    of_another_user(
        run / name if name else run, target if name in ("", "checkpoints") else target / "file"
    )
    with pytest.raises(ValueError, match="is a symbolic link that user 12345 has made"), own(run):
        claim(run, config, {})
    assert [path.name for path in target.iterdir()] == ["file"]
    assert (target / "file").read_text() == "precious"


def test_links_of_our_own_are(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "scratch").mkdir()
    Path(config.dir).symlink_to(tmp_path / "scratch")
    with own(Path(config.dir)):
        claim(Path(config.dir), config, {})
    assert (tmp_path / "scratch" / "config.yaml").is_file()


def test_the_lock_is_no_link(tmp_path: Path, config: RunConfig) -> None:
    Path(config.dir).mkdir()
    (tmp_path / "precious").write_text("precious")
    (Path(config.dir) / "lock").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(ValueError, match="lock is a symbolic link: delete it"),
        own(Path(config.dir)),
    ):
        pass


def test_a_temporary_file_is_no_link(tmp_path: Path, config: RunConfig) -> None:
    run, precious = Path(config.dir), tmp_path / "precious"
    run.mkdir()
    precious.write_text("precious")
    for name in ("config.yaml", "deepspeed.json", "owner.json"):
        (run / f"{name}.tmp-{os.getpid()}").symlink_to(precious)
    with own(run):
        claim(run, config, {})
    assert precious.read_text() == "precious"
    assert not (run / "config.yaml").is_symlink() and (run / "config.yaml").is_file()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `init_from` takes it."""
    folder = tmp_path_factory.mktemp("model")
    shape = load_config(tiny_preset(folder, folder), []).model
    export_hf(
        dict(fresh_weights(shape, 40, seed=1)),
        shape,
        40,
        folder / "hf",
        tokenizer_folder=None,
        model_card=None,
    )
    return folder / "hf"


@pytest.fixture
def hf(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "hf"))


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json"])
def test_weights_are_no_pickle(name: str, kind: str, hf: Path, canary: Path) -> None:
    if name.endswith(".bin"):
        (hf / "model.safetensors").unlink()
    (hf / name).write_bytes(pickled(kind, canary))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        import_hf(hf)
    assert not canary.exists()


CONFIGS: dict[str, dict[str, Any]] = {
    "it has auto_map": {"auto_map": {"AutoModel": "evil--evil.Model"}},
    "model_type is": {"model_type": ["bert"]},
    "hidden_size cannot be 'x'": {"hidden_size": "x"},
    "hidden_size cannot be 'None'": {"hidden_size": None},
    "hidden_size 1152921504606846976 is above": {"hidden_size": 1 << 60},
    "vocab_size cannot be": {"vocab_size": 1 << 60},
    "vocab_size cannot be '-1'": {"vocab_size": -1},
    "num_hidden_layers 1000000000 is above": {"num_hidden_layers": 10**9},
    "layer_norm_eps nan is not above 0": {"layer_norm_eps": float("nan")},
    "architectures is": {"architectures": {"os": "system"}},
}


@pytest.mark.parametrize("expected", CONFIGS)
def test_a_configuration_that_would_run_or_fill_something(expected: str, hf: Path) -> None:
    content = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(content | CONFIGS[expected]))
    (hf / "evil.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match=rf"cannot import .*config\.json.*{expected}"):
        import_hf(hf)


@pytest.mark.parametrize(
    "weight_map", [{"a": "../x.safetensors"}, {"a": "/etc/passwd"}, {"a": "x.bin"}, {}, [], None, {"a": 1}]
)  # fmt: skip
def test_an_index_names_files_beside_it_only(weight_map: object, hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json names .*: no files beside it"):
        import_hf(hf)


def test_a_tokenizer_that_is_a_program(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    content = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json has auto_map"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "sentencepiece.model"])
def test_a_tokenizer_is_no_pickle(name: str, kind: str, tmp_path: Path, canary: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).write_bytes(pickled(kind, canary))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        Tokenizer.load(tmp_path)
    assert not canary.exists()


def torch_file(form: str, kind: str, canary: Path, path: Path) -> None:
    """A .pt file in one of the forms that torch.load knows."""
    bomb = BOMBS[kind](canary)
    if form in ("zip", "legacy"):
        torch.save({"state": bomb}, path, _use_new_zipfile_serialization=form == "zip")
    elif form == "tar":  # torch's form before 0.1.11
        parts = ("sys_info", "storages", "tensors", "pickle")
        path.write_bytes(tar_of([(member(part), pickled(kind, canary)) for part in parts]))
    else:
        path.write_bytes(pickled(kind, canary))


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("form", ["zip", "legacy", "tar", "bare"])
def test_a_deepspeed_file_runs_nothing(form: str, kind: str, tmp_path: Path, canary: Path) -> None:
    folder = tmp_path / "global_step1"
    folder.mkdir()
    torch_file(form, kind, canary, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt was not loaded"):
        read_deepspeed(folder)
    assert not canary.exists()


def test_a_deepspeed_file_that_would_unpack_to_more(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(32 << 20))
    with pytest.raises(
        ValueError, match=r"x\.pt was not loaded: its .* bytes unpack to 33,554,432"
    ):
        load_safely(tmp_path / "x.pt")


def test_an_export_takes_what_is_ours_along_and_nothing_else(
    checkpoint: Path, model: Path, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "hf" / "model.safetensors").write_bytes(pickled("system", canary))
    seal(checkpoint)
    for options in ([], ["--ema"]):
        assert main(["export", str(checkpoint), str(tmp_path / "out"), *options]) == 78
    shutil.rmtree(checkpoint / "hf")
    shutil.copytree(model, checkpoint / "hf")
    (checkpoint / "hf" / "pytorch_model.bin").write_bytes(pickled("system", canary))
    seal(checkpoint)
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    told = capsys.readouterr().err
    assert "Traceback" not in told and str(checkpoint) in told
    assert not canary.exists()
