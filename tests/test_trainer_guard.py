"""NaN and spikes: passed over, told, or gone back from; and a healthy curve raises no alarm."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import FAULTY, ROOT, launch, read_metrics, tiny_preset

from launcher import cli
from trainer.checkpoint_files import list_checkpoints, problems_of
from trainer.guard import Guard, GuardConfig


def events(run: Path, what: str) -> list[dict]:
    lines = (run / "jobs.jsonl").read_text(encoding="utf-8").splitlines()
    found = [line for line in map(json.loads, lines) if line["kind"] == "event"]
    return [event for event in found if event["what"] == what]


def curve(run: Path) -> list[tuple]:
    return [(m["step"], m["loss"], m["grad_norm"], m["rows_digest"]) for m in read_metrics(run)]


def hf_weights(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step-{step:08d}" / "hf" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("stage", "precision", "clip_norm"),
    [
        ("zero0", "fp32", 1.0), ("zero0", "bf16", 0.0), ("zero1", "bf16", 1.0), ("zero2", "fp32", 0.0),
        ("zero3", "fp32", 1.0), ("zero2_offload", "bf16", 1.0), ("zero3_offload", "bf16", 1.0),
    ],
)  # fmt: skip
def test_a_nan_on_one_rank_changes_no_weight(
    stage: str, precision: str, clip_norm: float, tiny_dataset: Path, tmp_path: Path
) -> None:
    preset = tiny_preset(
        tmp_path, tiny_dataset, steps=6, save_every=1, keep_checkpoints=9, precision=precision,
        deepspeed=str(ROOT / "ds_configs" / f"{stage}.json"), optim={"clip_norm": clip_norm},
    )  # fmt: skip
    plan = [{"rank": 1, "step": 3, "at": "forward", "do": "nan"}]
    result = launch(preset, processes=2, script=FAULTY, FAULT_PLAN=json.dumps(plan))
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    assert hf_weights(run, 4) == hf_weights(run, 3)
    assert hf_weights(run, 5) != hf_weights(run, 4)
    metrics = {m["step"]: m for m in read_metrics(run)}
    assert "loss" not in metrics[4] and math.isfinite(metrics[5]["loss"])
    assert [metrics[step]["num_skipped_steps"] for step in (3, 4, 6)] == [0, 1, 1]
    assert metrics[4]["num_tokens"] > metrics[3]["num_tokens"]  # its rows are gone by
    (event,) = events(run, "skipped")
    assert event["step"] == 4 and "the weights stay as they were" in event["message"]


def test_nan_step_after_step_goes_back_and_over_the_rows(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN in steps 8, 9 and 10: back to step 6, on with the rows after those of step 10. Killed there and
    resumed on one process: the same."""
    changes = {"steps": 12, "save_every": 2, "keep_checkpoints": 9, "guard": {"patience": 3}}
    runs = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        preset = tiny_preset(folder, tiny_dataset, **changes)
        faults = [
            {
                "rank": 0,
                "step": step,
                "at": "forward",
                "do": "nan",
                "once": str(folder / f"at{step}"),
            }
            for step in (7, 8, 9)
        ]
        if name == "killed":
            died, back = str(folder / "died"), str(folder / "at9")
            faults.append(
                {"rank": 1, "step": 7, "at": "data", "do": "kill", "once": died, "after": back}
            )
        plan = json.dumps(faults)
        result = launch(preset, processes=2, script=FAULTY, FAULT_PLAN=plan)
        if name == "killed":
            assert result.returncode == 1
            result = launch(preset, processes=2, script=FAULTY, FAULT_PLAN=plan)
        assert result.returncode == 0, result.stderr
        runs.append(folder / "run")
    whole, killed = runs
    (event,) = events(whole, "rewind")
    assert "Back to step-00000006; its next 64 rows are passed over" in event["message"]
    assert curve(whole) == curve(killed)
    assert [values[0] for values in curve(whole)] == list(range(1, 13))
    assert hf_weights(whole, 12) == hf_weights(killed, 12)
    for step in (6, 7, 12):  # compares the rows' digest with the logged one
        assert cli.main(["blame", str(whole), str(step)]) == 0
        assert "These are the rows that were trained on" in capsys.readouterr().out
    for checkpoint in list_checkpoints(killed)[3:]:
        shutil.rmtree(checkpoint)  # the jump is known from its own record alone now
    assert cli.main(["blame", str(killed), "7"]) == 0


def test_going_back_again_and_again_ends_the_run(tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, steps=12, save_every=2, guard={"patience": 2})
    plan = [{"rank": 0, "step": 5, "at": "forward", "do": "nan", "times": 99}]
    result = launch(preset, script=FAULTY, FAULT_PLAN=json.dumps(plan))
    assert result.returncode == 79
    assert "went back to step 4 for this 2 times already" in result.stderr
    assert all(problems_of(checkpoint) == [] for checkpoint in list_checkpoints(tmp_path / "run"))


def test_a_spike_is_told_and_a_lasting_one_gone_back_from(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    guard = {"window": 10, "patience": 3, "alarm_sigmas": 30.0, "rewind_sigmas": 60.0}
    preset = tiny_preset(tmp_path, tiny_dataset, steps=30, save_every=4, guard=guard)
    plan = [
        {"rank": 0, "step": step, "at": "forward", "do": "spike", "once": str(tmp_path / str(step))}
        for step in (14, 20, 21, 22)
    ]
    result = launch(preset, script=FAULTY, FAULT_PLAN=json.dumps(plan))
    assert result.returncode == 0, result.stderr
    assert [event["step"] for event in events(tmp_path / "run", "alarm")] == [15, 21, 22]
    (event,) = events(tmp_path / "run", "rewind")
    assert "Back to step-00000020" in event["message"]


def test_no_false_alarm_on_a_healthy_curve() -> None:
    """10,000 steps of a falling loss with the noise of real ones, and its heavy tail."""
    rng = np.random.default_rng(3)
    guard = Guard(GuardConfig())
    losses = 2 + 8 * np.exp(-np.arange(10_000) / 800) + 0.05 * rng.standard_t(10, 10_000)
    verdicts = [guard.judge(step, loss, 1.0)[0] for step, loss in enumerate(losses.tolist(), 1)]
    assert set(verdicts) == {"fine"}


def test_a_spike_is_seen_at_once() -> None:
    rng = np.random.default_rng(4)
    guard = Guard(GuardConfig())
    for step in range(1, 300):
        assert guard.judge(step, 3 + 0.05 * rng.standard_normal(), 1.0)[0] == "fine"
    verdicts = [guard.judge(step, 9.0, 1.0)[0] for step in range(300, 305)]
    assert verdicts == ["alarm"] * 4 + ["rewind"] and guard.first_bad_step == 300


def test_wrong_settings_of_the_guard_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"guard\.window 5 is below 10; guard.patience 0 is below 1"
    ):
        GuardConfig(window=5, patience=0)
    with pytest.raises(ValueError, match=r"guard\.rewind_sigmas 2.0 is below alarm_sigmas 8.0"):
        GuardConfig(rewind_sigmas=2.0)
