"""Damaged checkpoints, wrong folders, wrong settings: one clear error, and nothing is lost."""

import shutil
from pathlib import Path

import pytest
from support import launch, read_metrics, tiny_preset, write_corpus

from trainer.checkpoint_files import list_checkpoints, problems_of
from trainer.fragments import share_out
from trainer.metrics import forget_after
from trainer.run_folder import own


@pytest.fixture(scope="module")
def finished(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 3 and 6; copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished")
    assert launch(tiny_preset(folder, tiny_dataset, steps=6)).returncode == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGE = {
    "bit": lambda folder: flip_one_bit(next(folder.glob("train_state-*"))),
    "hf bit": lambda folder: flip_one_bit(folder / "hf" / "model.safetensors"),
    "truncated": lambda folder: (folder / "state.json").write_text("{"),
    "missing": lambda folder: next(folder.glob("train_state-*")).unlink(),
    "no manifest": lambda folder: (folder / "MANIFEST.json").unlink(),
    "odd manifest": lambda folder: (folder / "MANIFEST.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_is_found_and_named(damage: str, run: Path) -> None:
    newest = list_checkpoints(run)[-1]
    assert problems_of(newest) == []
    DAMAGE[damage](newest)
    problems = problems_of(newest)
    assert len(problems) == 1 and str(newest) in problems[0]


def test_a_damaged_checkpoint_is_left_aside_and_made_again(
    run: Path, finished: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    flip_one_bit(run / "checkpoints" / "step-00000006" / "hf" / "model.safetensors")
    result = launch(tiny_preset(tmp_path, tiny_dataset, steps=6))
    assert result.returncode == 0, result.stderr
    assert "step-00000006 is damaged" in result.stdout and "step-00000003" in result.stdout
    assert problems_of(run / "checkpoints" / "step-00000006") == []
    assert [m["loss"] for m in read_metrics(run)] == [
        m["loss"] for m in read_metrics(finished / "run")
    ]


def test_a_run_never_starts_over_beside_its_damaged_past(
    run: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    for checkpoint in list_checkpoints(run):
        (checkpoint / "MANIFEST.json").unlink()
    result = launch(tiny_preset(tmp_path, tiny_dataset, steps=6))
    assert result.returncode == 78
    assert "no checkpoint of" in result.stderr and "is intact" in result.stderr
    assert len(list_checkpoints(run)) == 2


def test_other_settings_are_listed(run: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    result = launch(
        tiny_preset(tmp_path, tiny_dataset, steps=9), "optim.learning_rate=0.5", "seed=3"
    )
    assert result.returncode == 78
    for part in (
        "steps: 6 -> 9",
        "optim.learning_rate: 0.001 -> 0.5",
        "seed: 1 -> 3",
        "another dir=",
    ):
        assert part in result.stderr
    (run / "config.yaml").unlink()  # the checkpoint has the settings, too
    result = launch(tiny_preset(tmp_path, tiny_dataset, steps=6), "optim.learning_rate=0.5")
    assert result.returncode == 78
    assert "was made with other settings: optim.learning_rate: 0.001 -> 0.5" in result.stderr


def test_other_shards_are_refused(run: Path, tmp_path: Path) -> None:
    from data.prepare import PrepareConfig, prepare

    text = write_corpus(tmp_path / "other.jsonl", 300)
    other = prepare(
        PrepareConfig(
            output=str(tmp_path / "other"), sources={"first": (str(text),)}, vocab_size=360,
            heldout_fraction=0.05, block_tokens=4096, num_processes=1,
        )
    )  # fmt: skip
    result = launch(tiny_preset(tmp_path, other, steps=6))
    assert result.returncode == 78
    assert "dataset_digest: " in result.stderr


def test_a_foreign_folder_is_not_touched(tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    result = launch(tiny_preset(tmp_path, tiny_dataset))
    assert result.returncode == 78
    assert "thesis.tex" in result.stderr and "no run of ours" in result.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_what_a_job_killed_at_its_first_write_left_behind(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for name in ("lock", "owner.json.tmp-123", "config.yaml.tmp-123"):
        (tmp_path / "run" / name).write_text("")
    assert launch(tiny_preset(tmp_path, tiny_dataset, steps=3)).returncode == 0


def test_a_second_job_is_told_who_owns_the_run(
    run: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    import os

    with own(run):
        result = launch(tiny_preset(tmp_path, tiny_dataset, steps=6), processes=2)
    assert result.returncode != 0
    assert result.stderr.count("is being trained by another job") == 1  # rank 0 speaks for both
    assert f'"pid": {os.getpid()}' in result.stderr


def test_a_lock_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    """Whoever can write into the run's folder must not have another file made or changed by it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="lock is a symbolic link"), own(tmp_path / "run"):
        pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("changes", "processes", "expected"),
    [
        (
            {"global_batch_size": 18},
            1,
            "global_batch_size 18 is not a multiple of micro_batch_size 4 x 1 ranks = 4",
        ),
        (
            {"global_batch_size": 24},
            1,
            "global_batch_size 24 and data.num_lanes 16: one must divide the other",
        ),
        ({"data": {"path": "nowhere"}}, 1, "nowhere is not a folder: no complete dataset is there"),
        ({"data": {"weights": {"third": 1}}}, 1, "data.weights names ['third']"),
        ({"deepspeed": "nowhere.json"}, 2, "nowhere.json does not exist"),
    ],
)
def test_wrong_settings_stop_before_the_first_step(
    changes: dict, processes: int, expected: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    result = launch(tiny_preset(tmp_path, tiny_dataset, **changes), processes=processes)
    assert result.returncode != 0
    assert result.stderr.count(expected) == 1
    assert "Traceback" not in result.stderr or processes > 1  # torchrun adds its own
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_block_damaged_after_the_start_is_named(tiny_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, copy)
    for shard in copy.glob("*/train/*.tar"):
        content = bytearray(shard.read_bytes())
        for position in range(3000, len(content) - 2048, 5000):
            content[position] ^= 1
        shard.write_bytes(content)
    result = launch(tiny_preset(tmp_path, copy))
    assert result.returncode == 78
    assert "is damaged: xxh3 is" in result.stderr and "-train-000000.tar" in result.stderr


def test_a_run_that_cannot_learn_ends_as_diverged(tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(
        tmp_path,
        tiny_dataset,
        steps=30,
        save_every=1,
        optim={"learning_rate": 1e30, "clip_norm": 0.0},
        guard={"patience": 3},
    )
    result = launch(preset)
    assert result.returncode == 79, result.stderr
    assert "the weights stay as they were" in result.stderr and "learning_rate" in result.stderr
    assert all(problems_of(checkpoint) == [] for checkpoint in list_checkpoints(tmp_path / "run"))


def test_lines_of_steps_that_come_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1}', '{"st', '{"step": 2}', '{"step": 3}', '{"step": 4, "lo']
    path.write_text("\n".join(lines), encoding="utf-8")
    forget_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_ranks_share_the_writing() -> None:
    sizes = {f"p{i}": 100 + i for i in range(20)}
    owners = share_out(sizes, 4)
    loads = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(4)]
    assert sum(loads) == sum(sizes.values()) and max(loads) - min(loads) <= 119
