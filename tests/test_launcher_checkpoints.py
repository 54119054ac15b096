"""`cloze checkpoints list` and `verify` on the checkpoints of a real run."""

import json
import shutil
from pathlib import Path

import pytest
from support import launch, tiny_preset

from launcher.cli import main
from trainer.files import sha256_of


@pytest.fixture(scope="module")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 steps with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    done = launch(tiny_preset(folder, tiny_dataset, steps=4, save_every=2))
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_list_tells_what_is_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "list", str(run)]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["checkpoint", "step", "written", "size", "files", "tokens", "ranks"]
    assert [row.split()[:2] for row in rows] == [["step-00000002", "2"], ["step-00000004", "4"]]
    assert all(row.split()[-1] == "1" for row in rows)
    assert main(["checkpoints", "list", str(run), "--verify", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    state = json.loads((run / "checkpoints" / "step-00000004" / "state.json").read_text())
    files = [path for path in (run / "checkpoints" / "step-00000004").rglob("*") if path.is_file()]
    assert told[1]["num_tokens"] == state["num_tokens"] and told[1]["problems"] == []
    assert told[1]["num_files"] == len(files) - 1  # without the manifest
    size = sum(path.stat().st_size for path in files if path.name != "MANIFEST.json")
    assert told[1]["num_bytes"] == size


def test_verify_names_the_file_and_both_hashes(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoints", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": whole\n") == 2
    older, newer = sorted((run / "checkpoints").iterdir())
    shard = next(newer.glob("train_state-*"))
    before = sha256_of(shard)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    for source in (run, newer):
        assert main(["checkpoints", "verify", str(source)]) == 1
        told = capsys.readouterr().out
        assert f"{newer}: DAMAGED" in told
        assert f"{shard} has sha256 {sha256_of(shard)}, the manifest says {before}" in told
    assert main(["checkpoints", "verify", str(older)]) == 0
    capsys.readouterr()
    assert main(["checkpoints", "list", str(run), "--verify"]) == 1
    told = capsys.readouterr().out
    assert [line.split()[-1] for line in told.splitlines()[2:4]] == ["whole", "DAMAGED"]
    assert before in told


def test_a_manifest_that_cannot_be_read_is_told_also_without_verifying(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints" / "step-00000002" / "MANIFEST.json").write_text('{"files": [')
    assert main(["checkpoints", "list", str(run)]) == 1
    told = capsys.readouterr().out
    assert "step-00000004" in told
    assert "step-00000002 has a manifest or a state that cannot be read" in told
    assert main(["status", str(run)]) == 0
    assert "cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["list", "verify"])
def test_where_there_is_nothing_it_says_so(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoints", action, str(tmp_path)]) == 78
    assert str(tmp_path) in capsys.readouterr().err
