"""prepare again: after kills, a full disk, changed files; beside another; in a folder of something else."""

import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from prepare_support import config, corpus, dataset, fingerprint, run

from data.plan import locked_folder
from data.prepare import prepare
from data.shards import Dataset

__all__ = ["config", "corpus", "dataset"]  # fixtures, used by name


def test_finished_means_done(dataset, config, capsys):
    before = fingerprint(dataset.root)
    assert prepare(config) == dataset.root
    assert "is finished already" in capsys.readouterr().out
    assert fingerprint(dataset.root) == before


MOMENTS = [".work/scan/*", ".work/spill/*.tmp-*", ".work/spill/*.json", "mixed/*/*", "blocks.npy*"]


def test_killed_again_and_again(dataset, config, tmp_path):
    """SIGKILL in stage after stage; no worker lives on, and the last run leaves an unbroken one's bytes."""
    config = replace(config, output=str(tmp_path / "d"), num_processes=2)
    num_killed = 0
    for moment in MOMENTS:
        process = run(config, start_new_session=True)
        while process.poll() is None and not any((tmp_path / "d").glob(moment)):
            time.sleep(0.001)
        process.kill()
        process.communicate()  # returns when no worker holds the pipes any more
        num_killed += process.returncode == -signal.SIGKILL
        assert not session_members(process.pid)
    assert num_killed >= 4
    process = run(config)
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    assert fingerprint(tmp_path / "d") == fingerprint(dataset.root)


def session_members(session: int) -> list[str]:
    """Live processes of a session."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            members.append(path.parent.name)
    return members


@pytest.mark.parametrize("stage", ["scan_file", "encode_part", "write_bucket", "publish_dataset"])
def test_stopped_in_each_stage(dataset, config, tmp_path, monkeypatch, stage):
    """An interruption after the second task of a stage, or before publishing."""
    import data.prepare
    import data.stages

    config = replace(config, output=str(tmp_path / "d"))
    module = data.prepare if stage == "publish_dataset" else data.stages
    original, calls = getattr(module, stage), []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == (1 if stage == "publish_dataset" else 3):
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert not (tmp_path / "d" / "manifest.json").exists()
    with pytest.raises(ValueError, match="no complete dataset"):
        Dataset.open(tmp_path / "d")
    (tmp_path / "d" / ".work" / "spill").mkdir(parents=True, exist_ok=True)
    (tmp_path / "d" / ".work" / "spill" / "x.spill.tmp-999999").write_bytes(
        b"left by a killed process"
    )
    prepare(config)
    assert fingerprint(tmp_path / "d") == fingerprint(dataset.root)


def test_a_full_disk(dataset, config, tmp_path):
    """A limit on the size of files stands for the disk: the error is the system's own."""
    config = replace(config, output=str(tmp_path / "d"))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    process = run(config, preexec_fn=limit)
    output, errors = process.communicate()
    assert process.returncode == 3, output + errors
    assert "no room to write" in output and str(tmp_path / "d") in output
    assert "bytes are free" in output and "run the same command again" in output
    prepare(config)
    assert fingerprint(tmp_path / "d") == fingerprint(dataset.root)


def test_two_at_once_are_refused(config, tmp_path):
    with (
        locked_folder(tmp_path / "d"),
        pytest.raises(ValueError, match="another `cloze prepare` is at work"),
    ):
        prepare(replace(config, output=str(tmp_path / "d")))


def test_foreign_folders_are_left_alone(config, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"not empty and holds no plan .*thesis\.tex"):
        prepare(replace(config, output=str(tmp_path / "d")))
    assert fingerprint(tmp_path / "d").keys() == {"thesis.tex"}
    with pytest.raises(ValueError, match="is a file"):
        prepare(replace(config, output=str(tmp_path / "d" / "thesis.tex")))


def test_another_config_is_refused_by_name(dataset, config, corpus, tmp_path):
    changed = replace(config, block_tokens=2048, seed=5, sources={"mixed": (f"{corpus}/a.jsonl",)})
    with pytest.raises(ValueError) as error:
        prepare(changed)
    for part in (
        "block_tokens was 4096, is 2048",
        "seed was 1, is 5",
        "file long: 0.txt.gz is no longer among the input",
        "another folder",
    ):
        assert part in str(error.value)


def test_changed_input_is_refused(config, corpus, tmp_path, monkeypatch):
    shutil.copy(corpus / "a.jsonl", tmp_path / "a.jsonl")
    config = replace(config, output=str(tmp_path / "d"), sources={"s": (f"{tmp_path}/a.jsonl",)})
    with monkeypatch.context() as patch:
        patch.setattr("data.stages.encode_part", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ValueError, match=r"file s: a\.jsonl had \d+ bytes, has \d+"):
        prepare(config)


def _interrupt(*_):
    raise KeyboardInterrupt
