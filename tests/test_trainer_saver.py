"""A checkpoint is complete or absent, whenever its writers die; and no damage to one goes unseen."""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import torch
from damage_support import KINDS, SILENT, damage_checkpoint
from support import FAULTY, ROOT, launch, read_metrics, tiny_preset
from test_trainer_stopping import ledger

from model.config import ModelConfig
from model.hf import export_hf
from model.hf_parity import compare_logits, compare_weights
from model.weights import fresh_weights
from trainer import checkpoint_files
from trainer.checkpoint_files import list_checkpoints, problems_of, prune, read_state, step_of
from trainer.checkpoint_write import collect_notes, facts_of, publish, write_part
from trainer.saved_tensors import SavedTensors, key_of

PIECES = [  # of two ranks: one tensor lies across both partitions, one is whole
    {"master/a@0": torch.arange(5.0), "master/b": torch.ones(2, 3)},
    {"master/a@5": torch.arange(5.0, 9.0)},
]


def save(run: Path, step: int) -> None:
    """What two ranks and rank 0's thread do, one after the other."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [*folder.glob(".tmp-*"), *folder.glob(".trash-*")]:
        shutil.rmtree(stale)
    temporary = folder / f".tmp-{step}"
    temporary.mkdir()
    for rank in (1, 0):
        write_part(temporary, rank, 2, PIECES[rank])
    state, hf = temporary / "state.json", temporary / "hf"
    state.write_text(json.dumps({"format": checkpoint_files.FORMAT, "step": step}))
    files = collect_notes(temporary, 2, Event())
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    written = [state, hf / "config.json"]
    publish(temporary, folder / f"step-{step:08d}", files | facts_of(temporary, written))
    prune(run, 2, lambda step: False)


def in_a_process_that_dies(action: Callable[[], None], at_call: int) -> bool:
    """Run `action` in a fork that is killed before its `at_call`-th change of a file. False: it got through."""
    pid = os.fork()
    if pid == 0:
        calls = 0

        def count() -> None:
            nonlocal calls
            calls += 1
            if calls == at_call:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, arguments: tuple) -> None:
            writes = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"
            if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
                count()

        fsync = os.fsync
        os.fsync = lambda descriptor: (count(), fsync(descriptor))[1]
        sys.addaudithook(hook)
        action()
        os._exit(0)
    return os.waitpid(pid, 0)[1] != 0


def test_killed_before_every_single_change_of_a_file(tmp_path: Path) -> None:
    for point in range(1, 200):
        run = tmp_path / str(point)
        for step in (1, 2):
            save(run, step)
        died = in_a_process_that_dies(lambda run=run: save(run, 3), point)
        found = list_checkpoints(run)
        assert found and all(problems_of(checkpoint) == [] for checkpoint in found)
        assert step_of(found[-1]) in (2, 3)
        if not died:
            break
        save(run, 4)  # by the next job
        assert [step_of(c) for c in list_checkpoints(run)][-1] == 4
        assert {p.name for p in (run / "checkpoints").iterdir()} == {
            c.name for c in list_checkpoints(run)
        }
    assert not died and 25 < point < 199, point


def test_all_of_a_checkpoint_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure finds the checkpoint with all its bytes, or without its name."""
    events: list[tuple[str, Path]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("synced", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def noted_rename(source: Path, target: Path) -> None:
        rename(source, target)
        events.append(("renamed", Path(target)))

    def noted_replace(source: Path, target: Path) -> None:
        replace(source, target)
        if ("synced", Path(source)) in events:
            events.append(("synced", Path(target)))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(os, "replace", noted_replace)
    save(tmp_path, 1)
    temporary, final = tmp_path / "checkpoints" / ".tmp-1", list_checkpoints(tmp_path)[0]
    commit = events.index(("renamed", final))
    before = [path for what, path in events[:commit] if what == "synced"]
    files = json.loads((final / "MANIFEST.json").read_text())["files"]
    assert len(files) == 4
    wanted = [*map(temporary.joinpath, files), temporary / "MANIFEST.json", temporary / "hf"]
    assert [path for path in wanted if path not in before] == []
    assert temporary in before[before.index(temporary / "MANIFEST.json") :]
    assert ("synced", final.parent) in events[commit:]


@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_is_silent(kind: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    found = damage_checkpoint(list_checkpoints(tmp_path)[0], kind, 150, random.Random(1))
    assert found == {"refused": 150}
    assert problems_of(list_checkpoints(tmp_path)[0]) == []  # all was undone


def test_without_hashes_damage_would_be_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint_files, "sha256_of", lambda path: "")
    files = tmp_path / "checkpoints" / "step-00000001" / "MANIFEST.json"
    manifest = json.loads(files.read_text())
    for facts in manifest["files"].values():
        facts["sha256"] = ""
    files.write_text(json.dumps(manifest))
    found = damage_checkpoint(list_checkpoints(tmp_path)[0], "flips", 100, random.Random(1))
    assert found[SILENT] > 30


def test_pieces_are_put_together(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with SavedTensors(list_checkpoints(tmp_path)[0]) as saved:
        assert saved.sizes() == {"master/a": 9, "master/b": 6}
        assert saved.read("master/a", 3, 7).tolist() == [3, 4, 5, 6]
        assert saved.read("master/b", 1, 6).tolist() == [1] * 5
        assert saved.problems({"master/a": 9, "master/c": 1}) == [
            "it lacks master/c",
            "it holds master/b, which the model has not",
        ]


def test_pieces_that_leave_a_gap_are_refused(tmp_path: Path) -> None:
    write_part(tmp_path, 0, 1, {key_of("master", "a", 2, False): torch.ones(3)})
    with pytest.raises(ValueError, match="holds master/a in pieces that do not fit: 2-5"):
        SavedTensors(tmp_path)


def test_a_rank_that_cannot_write_fails_the_save_and_not_the_run(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    """Its disk is full once: the run goes on, and the next save is sound."""
    preset = tiny_preset(tmp_path, tiny_dataset, steps=12, save_every=4, keep_checkpoints=9)
    result = launch(preset, processes=2, script=FAULTY, FULL_DISK="1", FULL_DISK_STEP="4")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    assert [step_of(checkpoint) for checkpoint in list_checkpoints(run)] == [8, 12]
    assert all(problems_of(checkpoint) == [] for checkpoint in list_checkpoints(run))
    (event,) = [e for e in ledger(run, "event") if e["what"] == "save_failed"]
    assert "rank 1: " in event["message"] and "No space left on device" in event["message"]
    assert len(read_metrics(run)) == 12
    assert not list((run / "checkpoints").glob(".tmp-*"))


def test_some_checkpoints_are_kept_for_good(tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(
        tmp_path, tiny_dataset, steps=12, save_every=1, keep_checkpoints=2, keep_every=5
    )
    assert launch(preset).returncode == 0
    kept = [step_of(checkpoint) for checkpoint in list_checkpoints(tmp_path / "run")]
    assert kept == [5, 10, 11, 12]
    assert read_state(list_checkpoints(tmp_path / "run")[0])["step"] == 5


CONFIG = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=48,
)  # fmt: skip


def test_an_exported_folder_that_is_not_what_was_trained_is_refused(tmp_path: Path) -> None:
    weights = dict(fresh_weights(CONFIG, 100, seed=1))
    export_hf(weights, CONFIG, 100, tmp_path, tokenizer_folder=None, model_card=None)
    assert compare_weights(tmp_path, weights, CONFIG)["weights"] == "equal"
    assert compare_logits(tmp_path)["relative_difference"] < 1e-4
    name = "layers.1.output.weight" if "layers.1.output.weight" in weights else [*weights][20]
    changed = {**weights, name: weights[name] + 1e-6}
    with pytest.raises(ValueError, match="does not hold what was trained"):
        compare_weights(tmp_path, changed, CONFIG)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.5}))
    import model.hf_parity as parity

    read = parity.import_hf
    parity.import_hf = lambda folder: (read(folder)[0], CONFIG, 100)
    try:
        with pytest.raises(ValueError, match="computes other logits"):
            compare_logits(tmp_path)
    finally:
        parity.import_hf = read


def test_ranks_that_compute_with_different_weights_are_named(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    """One bit of a weight flips in rank 1's memory, and stays: nothing is saved of what follows.

    (At ZeRO 1 and 2 the next step's all-gather would put it right.)
    """
    zero0 = str(ROOT / "ds_configs" / "zero0.json")
    preset = tiny_preset(tmp_path, tiny_dataset, steps=12, save_every=4, deepspeed=zero0)
    result = launch(preset, processes=2, script=FAULTY, FLIP_STEP="5")
    assert result.returncode == 1
    assert "hold other weights than the rest" in result.stderr
    assert [step_of(checkpoint) for checkpoint in list_checkpoints(tmp_path / "run")] == [4]


def test_a_weight_that_is_no_number_is_never_saved(tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, steps=12, save_every=4)
    result = launch(preset, processes=2, script=FAULTY, NAN_STEP="8")
    assert result.returncode == 1
    assert "NaN or infinity in master of" in result.stderr
    assert [step_of(checkpoint) for checkpoint in list_checkpoints(tmp_path / "run")] == [4]


def test_a_checkpoint_of_the_first_format_goes_on(tiny_dataset: Path, tmp_path: Path) -> None:
    """It held whole tensors only, as stage 0 writes them to this day."""
    zero0 = str(ROOT / "ds_configs" / "zero0.json")
    preset = tiny_preset(tmp_path, tiny_dataset, steps=6, deepspeed=zero0)
    assert launch(preset).returncode == 0
    run = tmp_path / "run"
    expected = [m["loss"] for m in read_metrics(run)]
    old, newest = list_checkpoints(run)
    shutil.rmtree(newest)
    for name in ("state.json", "MANIFEST.json"):
        path = old / name
        document = {**json.loads(path.read_text()), "format": "cloze-checkpoint-v1"}
        if name == "MANIFEST.json":
            document["files"] |= facts_of(old, [old / "state.json"])
        path.write_text(json.dumps(document))
    again = launch(tiny_preset(tmp_path, tiny_dataset, steps=6), processes=2)
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stdout
    assert [m["loss"] for m in read_metrics(run)] == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (checkpoint,) = list_checkpoints(tmp_path)
    path = checkpoint / "MANIFEST.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "cloze-checkpoint-v9"}))
    (problem,) = problems_of(checkpoint)
    assert "has format 'cloze-checkpoint-v9', this version reads" in problem


def test_a_writer_of_an_earlier_job_cannot_touch_what_was_committed(tmp_path: Path) -> None:
    """Stopped in the middle of its save, it wakes up after the next job has saved the same step."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    stale = folder / ".tmp-earlier"
    stale.mkdir()
    write_part(stale, 0, 1, PIECES[0])
    save(tmp_path, 1)  # clears what is stale away, as every save does
    before = {p: p.read_bytes() for p in list_checkpoints(tmp_path)[0].rglob("*") if p.is_file()}
    with pytest.raises(OSError, match="No such file"):
        publish(stale, folder / "step-00000001", {})
    assert {p: p.read_bytes() for p in before} == before
    assert problems_of(list_checkpoints(tmp_path)[0]) == []
