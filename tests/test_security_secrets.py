"""Eight secrets, in the environment and in presets: none is in what a run writes, prints or shows (G19)."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from support import ROOT, environment, read_metrics, tiny_preset

from trainer.config import load_config

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIACANARY0000000001",
    "AWS_SECRET_ACCESS_KEY": "canary0002/aws+secret",
    "HF_TOKEN": "hf_canary0003",
    "MLFLOW_TRACKING_TOKEN": "canary0004mlflow",
    "WANDB_API_KEY": "canary0005wandb",
    "PRESIGNED_URL": "https://bucket.host/x?X-Amz-Signature=canary0006",
    "https_proxy": "http://user:canary0007@127.0.0.1:9",
    "AUTHORIZATION": "Bearer canary0008",
}
CANARIES = [value.encode() for value in SECRETS.values()] + [
    f"canary000{n}".encode() for n in range(2, 9)
]
LISTEN = "0A"  # state of a socket in /proc/net/tcp
COMMAND = [sys.executable, "-m", "launcher.cli", "train"]


def children_of(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


class Watched(NamedTuple):
    status: int
    printed: bytes
    lines: set[bytes]  # command lines of it and its children, as anybody may read them
    listening: set[str]  # addresses, as /proc/net has them


def watched(arguments: list[object]) -> Watched:
    """Run `cloze train` to its end."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        env={**environment(), **SECRETS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines: set[bytes] = set()
    listening: set[str] = set()
    while process.poll() is None:
        for pid in _still_there(process.pid):
            try:
                lines.add(Path(f"/proc/{pid}/cmdline").read_bytes())
                listening |= listeners(pid)
            except OSError:
                continue  # it has ended
        time.sleep(0.1)
    assert process.stdout is not None
    with process.stdout:
        return Watched(process.returncode, process.stdout.read(), lines, listening)


def listeners(pid: int) -> set[str]:
    """Addresses on which a process waits for connections."""
    sockets = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    return {
        row[1].partition(":")[0]
        for row in rows
        if row[3] == LISTEN and f"socket:[{row[9]}]" in sockets
    }


def _still_there(pid: int) -> list[int]:
    try:
        return children_of(pid)
    except OSError:
        return []


def leaks(folder: Path, *texts: bytes) -> list[str]:
    """Where one of the canaries is: a file's path, or "printed"."""
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files |= {f"printed {number}": text for number, text in enumerate(texts)}
    return sorted(
        place for place, content in files.items() if any(canary in content for canary in CANARIES)
    )


def test_a_leak_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "events").write_bytes(b"\0\1canary0005wandb\2")
    assert leaks(tmp_path, b"fine", b"Bearer canary0008") == [
        str(tmp_path / "a" / "b" / "events"),
        "printed 1",
    ]


def test_no_secret_of_the_environment_is_anywhere(tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, steps=3, eval_rows=16)
    status, printed, lines, listening = watched([preset])
    assert status == 0, printed.decode()
    assert len(read_metrics(tmp_path / "run")) == 3 and any(
        b"launcher.train" in line for line in lines
    )
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "hf" / "README.md").is_file()
    assert leaks(tmp_path, printed, *lines) == []
    # several processes meet at torch's store, which listens on all interfaces; a single one needs none
    assert listening and not any(set(address) == {"0"} for address in listening)


def test_nor_when_a_run_crashes(tiny_dataset: Path, tmp_path: Path) -> None:
    """A shard that is gone after the start, with a traceback asked for."""
    preset = tiny_preset(tmp_path, tiny_dataset, data={"path": "http://127.0.0.1:9/set"})
    os.environ["CLOZE_TRACEBACK"] = "1"
    try:
        status, printed, lines, _ = watched(
            [preset, "data.storage.num_retries=0", "--restarts", "0"]
        )
    finally:
        del os.environ["CLOZE_TRACEBACK"]
    assert status == 74 and b"Traceback" in printed, printed.decode()
    preset.unlink()
    assert leaks(tmp_path, printed, *lines) == []


IN_A_PRESET = {
    "dir": "https://user:canary0007@host/runs",
    "init_from": SECRETS["PRESIGNED_URL"],
    "deepspeed": "https://user:canary0007@host/ds.json",
    "data.path": "s3://AKIACANARY0000000001:canary0002@bucket/set",
    "data.storage.cache_dir": "https://host/x?token=canary0003",
    "data.storage.token": "hf_canary0003",
    "data.storage": "https://user:canary0007@host",
    "data.weights": "https://host/x?key=canary0005",
    "wandb_api_key": "canary0005wandb",
    "steps": "https://user:canary0007@host/",
}


@pytest.mark.parametrize("key", IN_A_PRESET)
@pytest.mark.parametrize("way", ["file", "override"])
def test_a_secret_in_a_preset_is_refused_and_not_repeated(
    way: str, key: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    """What stands in a preset stands in config.yaml, in every checkpoint and in the model card."""
    preset = tiny_preset(tmp_path, tiny_dataset)
    override = f"{key}={IN_A_PRESET[key]}"
    if way == "file":
        resolved = tmp_path / "secret.yaml"
        nested = ""
        for depth, name in enumerate(key.split(".")):
            nested += f"\n{'  ' * depth}{name}:"
        resolved.write_text(nested + f" {IN_A_PRESET[key]!r}\n")
        preset, override = resolved, "seed=1"
    with pytest.raises(ValueError, match=key.partition(".")[0]) as caught:
        load_config(preset, [override])
    assert leaks(tmp_path / "nothing", str(caught.value).encode()) == []


def test_what_to_do_instead_is_told(tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, init_from=SECRETS["PRESIGNED_URL"])
    with pytest.raises(
        ValueError, match=r"init_from https://bucket\.host/x\?\.\.\. holds a password"
    ) as caught:
        load_config(preset, [])
    assert "~/.netrc" in str(caught.value) and "AWS_SECRET_ACCESS_KEY" in str(caught.value)
