"""`cloze prove-resume` on real processes: it proves what is so, and finds what is not."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support import tiny_preset

from launcher.cli import main, parse
from launcher.proof_compare import compare
from launcher.proof_runs import copy_run, kill_marked, last_step, marked
from launcher.prove_resume import plan_of

ARGUMENTS = ["--steps", "7", "--kill-at", "5", "--world-sizes", "2,1", "--keep"]


@pytest.fixture(scope="module")
def proof(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """(exit status, what was printed, the scratch folder) of one proof on the tiny preset."""
    folder = tmp_path_factory.mktemp("proof")
    preset = tiny_preset(folder, tiny_dataset, steps=1000, optim={"warmup_steps": 50})
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CLOZE_OF_THIS_TEST", str(folder))
        status = main(["prove-resume", str(preset), *ARGUMENTS, "--scratch", str(folder / "s")])
    assert not (folder / "run").exists()  # the preset's own folder
    assert marked(f"CLOZE_OF_THIS_TEST={folder}") == []
    scratch = next((folder / "s").iterdir())
    return status, "\n".join(printed), scratch


def test_a_sound_preset_is_proved(proof: tuple[int, str, Path]) -> None:
    status, printed, scratch = proof
    assert status == 0, printed
    rows = [line.split() for line in printed.splitlines() if " -> " in line]
    assert rows[0][:8] == ["2", "->", "2", rows[0][3], *["equal"] * 4]
    assert rows[0][-2:] == ["equal", "kept"] and rows[1][-2:] == ["1e-05", "kept"]
    assert rows[1][4:6] == ["equal", "equal"]  # rows, learning rate
    assert 0 < int(rows[0][3]) <= 6  # it was resumed, and from a checkpoint
    assert "PROVED: every step is that of the unbroken run, bit for bit in 2 processes" in printed
    same = compare(scratch / "unbroken", scratch / "resumed-0-2")
    assert same.num_steps == 7 and same.first is None and set(same.largest.values()) == {0.0}
    other = compare(scratch / "unbroken", scratch / "resumed-1-1")
    assert other.largest["loss"] < 1e-5 and other.largest["weights"] > 0 and other.first
    assert other.problem(1e-5) is None and other.problem(None) == other.first


def test_what_is_not_the_same_is_found(proof: tuple[int, str, Path], tmp_path: Path) -> None:
    unbroken = proof[2] / "unbroken"

    def altered(name: str) -> Path:
        shutil.copytree(unbroken, tmp_path / name)
        return tmp_path / name

    for field, bound in (
        ("loss", None),
        ("grad_norm", None),
        ("rows_digest", 1e-5),
        ("loss", 1e-5),
    ):
        run = altered(f"{field}-{bound}")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines[3][field] *= 1 + 2**-52 if bound is None else 2
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "metrics.jsonl").write_text(text)
        problem = compare(unbroken, run).problem(bound)
        assert problem and f"{field} of step 4 is " in problem
    run = altered("weight")
    path = next(run.glob("checkpoints/step-00000007/train_state-00001*"))
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path)
    assert f"{name.partition('@')[0]} differs" in str(compare(unbroken, run).problem(None))
    run = altered("step")
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*text[:2], *text[3:]]))
    assert "steps [3] are told by one" in str(compare(unbroken, run).problem(1e-5))
    (run / "metrics.jsonl").write_text("".join([*text[:2], *text[1:]]))
    with pytest.raises(ValueError, match="has step 2 twice"):
        compare(unbroken, run)


def test_a_copy_shares_checkpoints_and_nothing_that_is_written_to(
    proof: tuple[int, str, Path], tmp_path: Path
) -> None:
    killed = proof[2] / "killed"
    copy_run(killed, proof[2] / "copy")
    for path in (proof[2] / "copy").rglob("*"):
        if path.is_file():
            assert path.samefile(killed / path.relative_to(proof[2] / "copy")) == (
                "checkpoints" in path.parts
            )
    assert last_step(killed / "metrics.jsonl") >= 5
    assert last_step(tmp_path / "none.jsonl") == 0
    kill_marked("CLOZE_PROOF=nobody")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kill-at", "12,40"], r"--kill-at 12 is not in 1 to 11; --kill-at 40 is not in 1 to 11"),
        (["--world-sizes", "2,0"], "--world-sizes: 0 is below 1"),
        (["--world-sizes", "2,3"], "global_batch_size 16"),
        (["--steps", "2"], "--steps 2 is below 3"),
        (["stepss=3"], "unknown key stepss"),
    ],
)
def test_what_cannot_be_proved_is_refused_at_once(
    arguments: list[str], message: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset)
    with pytest.raises(ValueError, match=message):
        plan_of(parse(["prove-resume", str(preset), *arguments]))


def test_the_plan_keeps_what_matters_and_cuts_the_rest(tiny_dataset: Path, tmp_path: Path) -> None:
    phases = [{"first_step": 4, "sequence_length": 32}, {"first_step": 900, "sequence_length": 64}]
    preset = tiny_preset(
        tmp_path, tiny_dataset, steps=1000, phases=phases, optim={"warmup_steps": 90}
    )
    plan = plan_of(parse(["prove-resume", str(preset), "precision=bf16", "--kill-at", "9,3"]))
    assert (plan.run.steps, plan.run.optim.warmup_steps, plan.run.save_every) == (12, 6, 3)
    assert [phase.first_step for phase in plan.run.phases] == [4]
    assert plan.kill_at == (3, 9) and plan.run.precision == "bf16" and plan.run.log_every == 1


def test_a_run_that_does_not_start_says_why(
    tmp_path: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tiny_preset(tmp_path, tmp_path / "none")
    scratch = tmp_path / "scratch"
    arguments = ["--world-sizes", "1", "--scratch", str(scratch)]
    assert main(["prove-resume", str(preset), *arguments]) == 78
    told = capsys.readouterr().err
    assert "training in 1 process ended with exit status" in told and "none" in told
    assert list(scratch.iterdir()) == []
