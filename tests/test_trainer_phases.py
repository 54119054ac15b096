"""Row length, mixture and batch that change on the way: planned, by hand, stopped anywhere, on any ranks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import ROOT, launch, read_metrics, tiny_preset

from data.lanes import DataConfig, Lanes, StreamState
from data.phases import Phase
from data.shards import Dataset
from trainer.config import load_config
from trainer.state import TrainState
from trainer.stretch import _in_phase
from trainer.world import AgreedError, World

EXACT = ("loss", "mlm_loss", "nsp_loss", "num_tokens", "rows_digest")
PHASES = [
    {"first_step": 3, "global_batch_size": 32},
    {"first_step": 5, "sequence_length": 32, "micro_batch_size": 8},
    {"first_step": 7, "weights": {"first": 1, "second": 2}},
]
START = {"steps": 9, "phases": PHASES, "save_every": 1, "keep_checkpoints": 9}


def curve(run: Path) -> list[tuple]:
    return [(m["step"], *(m[name] for name in EXACT)) for m in read_metrics(run)]


@pytest.fixture(scope="module")
def unbroken(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of all phases in one job of one process."""
    folder = tmp_path_factory.mktemp("unbroken")
    result = launch(tiny_preset(folder, tiny_dataset, **START))
    assert result.returncode == 0, result.stderr
    assert "a new phase begins at step 5" in result.stdout
    assert "16 of 16 lanes leave the rest of their open block" in result.stdout
    return folder / "run"


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero2_offload", "zero3"])
def test_phases_are_the_same_on_two_ranks(
    stage: str, unbroken: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    deepspeed = str(ROOT / "ds_configs" / f"{stage}.json")
    preset = tiny_preset(tmp_path, tiny_dataset, **START, deepspeed=deepspeed)
    result = launch(preset, processes=2)
    assert result.returncode == 0, result.stderr
    for ours, theirs in zip(curve(tmp_path / "run"), curve(unbroken), strict=True):
        assert ours[0] == theirs[0] and ours[4:] == theirs[4:]
        assert ours[1:4] == pytest.approx(theirs[1:4], rel=1e-5)
    norms = [[m["grad_norm"] for m in read_metrics(run)] for run in (tmp_path / "run", unbroken)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("step", [4, 5, 6, 8])
def test_stopping_within_and_between_phases_changes_nothing(
    step: int, unbroken: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, **START)
    shutil.copytree(unbroken, tmp_path / "run")
    for later in range(step + 1, 10):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{later:08d}")
    result = launch(preset)
    assert result.returncode == 0, result.stderr
    assert f"resuming from {tmp_path / 'run' / 'checkpoints' / f'step-{step:08d}'}" in result.stdout
    assert curve(tmp_path / "run") == curve(unbroken)


def test_a_change_by_hand_needs_new_phase_and_is_remembered(
    unbroken: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, **{**START, "phases": []})
    first = launch(preset)
    assert first.returncode == 0, first.stderr
    for later in range(6, 10):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{later:08d}")
    changed = ["data.sequence_length=32", "global_batch_size=32"]
    refused = launch(preset, *changed)
    assert refused.returncode == 78
    assert "global_batch_size: 16 -> 32; sequence_length: 64 -> 32" in refused.stderr
    assert "--new-phase" in refused.stderr
    result = launch(preset, *changed, "--new-phase")
    assert result.returncode == 0, result.stderr
    state = json.loads(
        (tmp_path / "run" / "checkpoints" / "step-00000009" / "state.json").read_text()
    )
    assert [(p["first_step"], p["first_row"]) for p in state["phases"]] == [(0, 0), (5, 80)]
    assert state["stream"]["row"] == 80 + 4 * 32
    again = launch(preset, *changed)  # the phase goes on without being asked for again
    assert again.returncode == 0, again.stderr


def test_a_planned_phase_is_no_leave_for_another_dataset(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    """It may come with the settings that were planned; other shards need to be asked for."""
    run = load_config(tiny_preset(tmp_path, tiny_dataset, **START), [])
    dataset, world = Dataset.open(tiny_dataset), World(0, 1, 0, torch.device("cpu"))
    before = Phase.of(run.data, dataset, 16, 0, 0)
    state = TrainState(3, 0, 0, StreamState.start(16, 1), (before,))
    planned = replace(before, first_step=3, first_row=48, global_batch_size=32)
    assert _in_phase(run, state, planned, world, False).phases == (before, planned)
    with pytest.raises(AgreedError, match=r"dataset_digest: .* add --new-phase"):
        _in_phase(run, state, replace(planned, dataset_digest="0" * 32), world, False)


def test_phases_that_cannot_be_are_refused_at_the_door(tiny_dataset: Path, tmp_path: Path) -> None:
    phases = [
        {"first_step": 6, "sequence_length": 512},
        {"first_step": 4},
        {"first_step": 7, "masked_fraction": 2.0},
    ]
    result = launch(tiny_preset(tmp_path, tiny_dataset, phases=phases))
    assert result.returncode == 78
    for part in (
        "phases begin at steps [6, 4, 7]: they must ascend",
        "data.sequence_length 512 is over model.max_position_embeddings 64 at step 6",
        "data.masked_fraction 2.0 is not between 0 and 1",
    ):
        assert part in result.stderr
    result = launch(
        tiny_preset(tmp_path, tiny_dataset, phases=[{"first_step": 4, "global_batch_size": 24}])
    )
    assert result.returncode == 78 and "global_batch_size 24" in result.stderr


def test_a_damaged_block_is_passed_over_again_when_steps_are_repeated(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    """Two ranks. The block is mended before the job that repeats the steps: it stays out all the same."""
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_dataset, damaged)
    dataset = Dataset.open(tiny_dataset)
    data = DataConfig(path=str(tiny_dataset), sequence_length=64, num_lanes=16)
    _, index = Lanes(dataset, data, 1, StreamState.start(16, 1)).block_of(5, 0, 1)
    with (damaged / dataset.shard_of(index).relative_to(tiny_dataset)).open("r+b") as file:
        file.seek(int(dataset.blocks[index]["offset"]) + 3000)
        file.write(b"\xff\xff\xff\xff")
    options = {"steps": 12, "global_batch_size": 128, "micro_batch_size": 16, "save_every": 2}
    preset = tiny_preset(tmp_path, damaged, **options, keep_checkpoints=9)
    refused = launch(preset, processes=2)
    assert refused.returncode == 1 and f"block {index} (" in refused.stderr
    result = launch(preset, "data.max_damaged_blocks=1", processes=2)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    (line,) = (run / "damaged_blocks.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert (event["lane"], event["window"], event["block"]) == (5, 1, index)
    first = curve(run)
    assert 4 < event["step"] < 12
    for step in range(event["step"], 13):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    mended = launch(preset, f"data.path={tiny_dataset}", processes=1)
    assert mended.returncode == 0, mended.stderr
    assert [c[4:] for c in curve(run)] == [c[4:] for c in first]
    assert len((run / "damaged_blocks.jsonl").read_text().splitlines()) == 1
