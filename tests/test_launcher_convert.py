"""Checkpoints that DeepSpeed wrote, from two real ranks, become ours bit for bit; bombs do not go off."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed_worker import CASES, SHAPE, STEPS
from safetensors.torch import load_file
from support import ROOT, environment, launch, read_metrics, tiny_preset

from launcher.cli import main
from model.config import ModelConfig
from model.hf_names import from_hf_names
from trainer.deepspeed_files import load_safely, read_deepspeed
from trainer.saved_tensors import SavedTensors

UNIVERSAL = {"stage2-bf16": ["--inject_missing_state"], "stage3-bf16": []}


def run_python(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env={**environment(), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each case, what the engine held beside it, and two universal ones."""
    folder = tmp_path_factory.mktemp("deepspeed")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run_python(*torchrun, "tests/deepspeed_worker.py", folder, *CASES)
    for case, more in UNIVERSAL.items():
        tag = f"global_step{STEPS}"
        run_python(
            "deepspeed.checkpoint.ds_to_universal", "--input_folder", folder / case / tag,
            "--output_folder", folder / f"{case}-universal" / tag, *more,
        )  # fmt: skip
    return folder


@pytest.fixture
def preset(tiny_dataset: Path, tmp_path: Path) -> Path:
    return tiny_preset(tmp_path, tiny_dataset, steps=6, model=SHAPE)


def with_zero(made: Path) -> list[str]:
    return [
        *(case for case in CASES if "stage0" not in case),
        *(f"{case}-universal" for case in UNIVERSAL),
    ]


def test_every_master_and_moment_is_what_the_engine_held(made: Path) -> None:
    for case in with_zero(made):
        plain = case.removesuffix("-universal")
        held = load_file(made / f"{plain}.safetensors")
        found = read_deepspeed(made / case)
        read = {f"{part}/{n}": v for n, parts in found.parts.items() for part, v in parts.items()}
        assert read.keys() == held.keys(), case
        assert all(torch.equal(read[key], held[key]) for key in held), case
        told = json.loads((made / f"{plain}.json").read_text())
        assert (found.step, found.optimizer_step) == (STEPS, told["optimizer_step"]), case


@pytest.mark.parametrize("case", ["stage1-bf16", "stage3-bf16", "stage2-hf"])
def test_a_converted_checkpoint_is_whole_and_trains_on(
    case: str, made: Path, preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new"
    arguments = [str(made / case), str(target), "--preset", str(preset)]
    assert main(["checkpoints", "convert", *arguments]) == 0
    told = capsys.readouterr().out
    assert f"step {STEPS}; its names were {'Hugging' if 'hf' in case else 'ours'}" in told
    assert f"cloze train {preset} dir={target}" in told
    assert main(["checkpoints", "verify", str(target)]) == 0
    held = load_file(made / f"{case}.safetensors")
    if "hf" in case:
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in held.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = value
        config = ModelConfig(**SHAPE)
        held = {
            f"{p}/{n}": v for p, w in parts.items() for n, v in from_hf_names(w, config).items()
        }
    with SavedTensors(target / "checkpoints" / f"step-{STEPS:08d}") as saved:
        assert saved.sizes() == {key: value.numel() for key, value in held.items()}
        for key, value in held.items():
            assert torch.equal(saved.read(key, 0, value.numel()), value.flatten()), key
    if case != "stage1-bf16":
        done = launch(preset, f"dir={target}", processes=1)
        assert done.returncode == 0, done.stderr
        assert f"steps {STEPS} to 6" in done.stdout
        assert [line["step"] for line in read_metrics(target)] == [4, 5, 6]


def test_what_does_not_fit_is_refused_and_nothing_is_written(
    made: Path, preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new"

    def refused(source: Path, *overrides: str) -> str:
        arguments = [str(source), str(target), "--preset", str(preset), *overrides]
        assert main(["checkpoints", "convert", *arguments]) == 78
        assert not target.exists()
        return capsys.readouterr().err

    case = made / "stage2-bf16"
    assert "layers.2.qkv.weight is missing" in refused(case, "model.num_hidden_layers=3")
    told = refused(case, "model.num_hidden_layers=1")
    assert "has no layers.1.attention_norm.bias" in told and "(and 4 others)" in told
    assert "has shape [32, 65] instead of [32, 64]" in refused(case, "model.intermediate_size=64")
    assert "the preset's run ends at 3" in refused(case, "steps=3")
    assert "taken as Hugging Face's" in refused(made / "stage2-hf", "model.num_hidden_layers=1")
    assert "stage 0" in refused(made / "stage0-fp32")
    assert "is no DeepSpeed checkpoint" in refused(tmp_path)
    (target / "checkpoints").mkdir(parents=True)
    arguments = [str(case), str(target), "--preset", str(preset)]
    assert main(["checkpoints", "convert", *arguments]) == 78
    assert "is not empty" in capsys.readouterr().err


def test_incomplete_and_altered_folders_are_refused(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "stage2-bf16", tmp_path / "copy"))
    states = sorted((folder / f"global_step{STEPS}").glob("*optim_states.pt"))
    whole = states[1].read_bytes()
    states[1].unlink()
    with pytest.raises(ValueError, match=r"has the states of ranks \[0\], of 2 ranks"):
        read_deepspeed(folder)
    states[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="was not loaded"):
        read_deepspeed(folder)
    for tag in ("../elsewhere", "", "/etc", "a\nb", "missing"):
        (folder / "latest").write_text(tag)
        with pytest.raises(ValueError, match="no folder beside it"):
            read_deepspeed(folder)


class Bomb:
    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


@pytest.mark.parametrize("where", ["optim", "model"])
@pytest.mark.parametrize("kind", ["system", "eval", "exec", "nested"])
def test_a_pickle_that_would_run_something_is_refused(
    kind: str, where: str, made: Path, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()"
    bombs: dict[str, object] = {
        "system": Bomb(os.system, f"touch {canary}"),
        "eval": Bomb(eval, code),
        "exec": Bomb(exec, code),
        "nested": {"state": [torch.zeros(2), {"deep": Bomb(eval, code)}]},
    }
    folder = Path(shutil.copytree(made / "stage2-bf16", tmp_path / "copy"))
    path = sorted((folder / f"global_step{STEPS}").glob(f"*{where}*.pt"))[-1]
    content = torch.load(path, weights_only=False)
    torch.save({**content, "more": bombs[kind]}, path)
    with pytest.raises(ValueError, match=r"was not loaded, for it is damaged or more than tensors"):
        read_deepspeed(folder)
    assert not canary.exists()
    torch.load(path, weights_only=False)  # the bomb is a real one
    assert canary.exists()


def test_pickles_of_any_age_are_refused(tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "bomb.pt"
    bomb = Bomb(os.system, f"touch {canary}")
    for is_zip in (True, False):
        torch.save(bomb, path, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(ValueError, match="was not loaded"):
            load_safely(path)
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    with pytest.raises(ValueError, match="was not loaded"):
        load_safely(path)
    assert not canary.exists()
