"""What `cloze submit` writes and refuses, and what a Slurm job decides when its processes have ended."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from ledger_support import Ledger
from support import tiny_preset

from launcher import slurm_job, submit
from launcher.cli import main, parse
from launcher.environment import environment_differences, environment_lines
from launcher.freeze import freeze
from trainer.config import load_config

SUBMIT = ["--nodes=2", "--hours=1"]


@pytest.fixture
def preset(tiny_dataset: Path, tmp_path: Path) -> Path:
    return tiny_preset(tmp_path, tiny_dataset)


def test_a_dry_run_shows_all_and_writes_nothing(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "submit",
                str(preset),
                *SUBMIT,
                "--gpus-per-node=4",
                "--sbatch=--qos=long",
                "--dry-run",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    for line in (
        "--nodes=2",
        "--time=1:00:00",
        "--gpus-per-node=4",
        "--qos=long",
        "--signal=B:USR1@120",
    ):
        assert f"#SBATCH {line}\n" in printed
    assert "srun" in printed and "8 of 8 steps are left" in printed
    assert not (tmp_path / "run").exists()


def test_the_script_is_valid_and_has_each_option_once(preset: Path, tmp_path: Path) -> None:
    options = parse(["submit", str(preset), *SUBMIT, "--jobs=3", "--partition=gpu", "--new-phase"])
    script = submit.batch_script(options, tmp_path / "a b" / "submit-1", 200, "name")
    path = tmp_path / "script"
    path.write_text(script)
    subprocess.run(["bash", "-n", path], check=True)
    keys = [line.split("=")[0] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert len(keys) == len(set(keys))
    assert "#SBATCH --dependency=singleton" in script and "export CLOZE_REQUEUE=0" in script
    assert f"set -- '{tmp_path}/a b/submit-1/config.yaml' --new-phase" in script


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nodes=3"], "3 nodes x 1 processes = 3 ranks do not divide"),
        (["--nodes=0"], "--nodes 0 is below 1"),
        (["--hours=0.05"], "leaves no time to train"),
        (["--signal-seconds=5"], "--signal-seconds 5 is too short"),
        (["--array=1-3"], "share dir"),
        (["--array=one"], "give numbers and ranges"),
        (["--sbatch=qos"], "give it as sbatch takes it"),
        (["data.path=/nowhere"], "/nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_it_is_queued(
    options: list[str], said: str, preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(preset), *SUBMIT, *options]) in (74, 78)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_signals_lead_is_what_was_measured(preset: Path, tmp_path: Path) -> None:
    config = load_config(preset, [])
    assert submit.needed_seconds(config) < submit.LEAST_LEAD_SECONDS
    lines = [
        {"kind": "start", "job": "a", "time": 1.0, "resumed_step": 0},
        {
            "kind": "progress", "job": "a", "time": 2.0, "step": 1, "seconds": {},
            "longest_step_seconds": 20.0, "longest_save_seconds": 400.0,
        },
    ]  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert submit.needed_seconds(config) == 1.5 * 420 + submit.SPARE_SECONDS


def test_a_frozen_run_is_the_same_from_anywhere(
    preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(preset, ["dir=here", "seed=7"])
    folder = tmp_path / "submit-1"
    freeze(folder, {"config.yaml": config})
    monkeypatch.chdir("/")
    again = load_config(folder / "config.yaml", [])
    assert (again.dir, again.seed) == (str(tmp_path / "here"), 7)
    assert Path(again.deepspeed).read_bytes() == Path(config.deepspeed).read_bytes()
    assert (folder / "code" / "slurm" / "train.sbatch").exists()
    assert not list(folder.rglob("__pycache__"))
    assert environment_differences(folder / "environment.txt") == []


def test_a_package_that_has_changed_is_named(tmp_path: Path) -> None:
    lines = [line for line in environment_lines() if not line.startswith("torch==")]
    (tmp_path / "environment.txt").write_text("\n".join([*lines, "torch==1.0", "gone==2"]))
    gone, torch = environment_differences(tmp_path / "environment.txt")
    assert gone.startswith("gone was 2 and is not installed") and torch.startswith(
        "torch was 1.0 and is 2."
    )


def ended(run: Path, *words: str, status: int = 1) -> int:
    """The decision after ranks that left these words."""
    folder = run / "slurm" / "job-1-start-1"
    folder.mkdir(parents=True, exist_ok=True)
    for rank, word in enumerate(words):
        (folder / f"rank-{rank}").write_text(word)
    return slurm_job.main(["end", str(folder), str(len(words)), str(status)])


def test_what_is_done_after_a_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(tmp_path, "0", "0", status=0) == 0
    assert ended(tmp_path, "75", "75") == 75
    assert ended(tmp_path, "70", "74") == 74
    assert ended(tmp_path, "78", "78") == 78
    assert ended(tmp_path, "70", "pid 5") == slurm_job.AGAIN
    assert "starting again from step 0" in capsys.readouterr().err
    assert ended(tmp_path, "pid 4", "75") == slurm_job.AGAIN  # torchrun asked the other one
    assert ended(tmp_path, "0", "", status=0) != 0  # a rank that never began


def test_starts_in_vain_are_bounded_over_all_jobs(tmp_path: Path) -> None:
    def checkpoint(step: int) -> None:
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)

    verdicts = [ended(tmp_path, "124", "70") for _ in range(4)]
    assert verdicts == [slurm_job.AGAIN] * 3 + [124]
    checkpoint(10)
    assert ended(tmp_path, "124", "70") == slurm_job.AGAIN
    checkpoint(20)
    assert [ended(tmp_path, "124", "70") for _ in range(4)] == [slurm_job.AGAIN] * 4
    assert ended(tmp_path, "124", "70") == 124


def test_a_run_that_its_stop_file_has_ended_is_not_requeued(tmp_path: Path) -> None:
    said = f"{tmp_path}/STOP was found (and removed) (rank 0)"
    Ledger().start(0).event("stop_requested", said).write(tmp_path)
    assert ended(tmp_path, "75", "75") == 0


def test_a_wrong_preset_ends_the_job_before_its_processes(
    preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load(preset.read_text())
    preset.write_text(yaml.safe_dump(settings | {"stepz": 3}))
    assert slurm_job.main(["begin", str(preset)]) == 78
    assert "stepz" in capsys.readouterr().err
