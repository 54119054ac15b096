"""What attackers leave behind: pickles that run something, datasets and checkpoints whose hashes agree."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors.torch import save_file
from support import ROOT, environment

from data.block_table import BLOCK_DTYPE
from data.files import file_digest
from data.manifest import sealed
from trainer.checkpoint_files import FORMAT
from trainer.checkpoint_write import facts_of


class Bomb:
    """Runs `call(*arguments)` when it is unpickled."""

    def __init__(self, call: object, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


class Waking:
    """Runs its state as Python when it is unpickled."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __getstate__(self) -> dict[str, str]:
        return {"code": self.code}

    def __setstate__(self, state: dict[str, str]) -> None:
        exec(state["code"], {})


BOMBS: dict[str, Callable[[Path], Any]] = {
    "system": lambda canary: Bomb(os.system, f"touch '{canary}'"),
    "eval": lambda canary: Bomb(eval, f"open({str(canary)!r}, 'w').close()"),
    "exec": lambda canary: Bomb(exec, f"open({str(canary)!r}, 'w').close()"),
    "nested": lambda canary: {"state": [1, {"deep": Bomb(Path.touch, Path(canary))}]},
    "setstate": lambda canary: Waking(f"open({str(canary)!r}, 'w').close()"),
}


def pickled(kind: str, canary: Path) -> bytes:
    return pickle.dumps(BOMBS[kind](canary))


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]], **options: Any) -> bytes:
    """An archive of members, each a header and its content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for info, content in members:
            info.size = info.size or len(content)
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def edit_manifest(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a dataset's manifest; its digests of the block table are made right again."""
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["blocks"] |= {
        "nbytes": (root / "blocks.npy").stat().st_size,
        "xxh3": file_digest(root / "blocks.npy"),
    }
    change(manifest)
    (root / "manifest.json").write_text(json.dumps(sealed(manifest)))


def replace_first_block(root: Path, forge: Callable[[bytes], bytes]) -> None:
    """Put other bytes where the first block was, with hashes that agree."""
    table = np.load(root / "blocks.npy").astype(BLOCK_DTYPE)
    shard = root / "src/train/src-train-000000.tar"
    content, size = shard.read_bytes(), int(table["nbytes"][0])
    forged = forge(content[:size])
    assert len(forged) == size
    shard.write_bytes(forged + content[size:])
    table["xxh3"][0] = xxhash.xxh3_64_intdigest(forged)
    np.save(root / "blocks.npy", table)
    edit_manifest(root, lambda manifest: None)


def replace_table(root: Path, change: Callable[[np.ndarray], object]) -> None:
    """Change rows of the block table in place, with hashes that agree."""
    table = np.load(root / "blocks.npy")
    change(table)
    np.save(root / "blocks.npy", table)
    edit_manifest(root, lambda manifest: None)


def write_checkpoint(folder: Path, settings: dict[str, Any]) -> Path:
    """A small checkpoint that verifies. settings: of its run."""
    (folder / "hf").mkdir(parents=True)
    save_file({"master/a": torch.zeros(4)}, folder / "train_state-00000-of-00001.safetensors")
    (folder / "hf" / "config.json").write_text("{}")
    stream = {"row": 0, "lanes": [[0, 0, -1, 0]], "damage": []}
    state = {
        "format": FORMAT, "step": 3, "num_tokens": 0, "rows_digest": 0, "optimizer_step": 3,
        "stream": stream, "phases": [], "config": settings,
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Make the manifest agree with what is in the checkpoint now."""
    (folder / "MANIFEST.json").unlink(missing_ok=True)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = {"format": FORMAT, "files": facts_of(folder, files)}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


class Outcome(NamedTuple):
    risen: int  # bytes, of the peak of its memory
    seconds: float
    said: str


def measure(readers: Path, bombs: dict[str, tuple[str, Path]]) -> dict[str, Outcome]:
    """What each bomb does to a process that reads it.

    readers: a program that defines `read_<kind>(path)`. bombs: name -> kind and path. One process
    imports all that they need, and is forked for each: a rise of memory is of that bomb alone.
    """
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            FORKS,
            str(readers),
            json.dumps({k: [v[0], str(v[1])] for k, v in bombs.items()}),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: Outcome(*values) for name, values in map(json.loads, done.stdout.splitlines())}


FORKS = """
import json, os, resource, runpy, signal, sys, time

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

readers = runpy.run_path(sys.argv[1])
for name, (kind, path) in json.loads(sys.argv[2]).items():
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0, name
        continue
    signal.alarm(60)  # seconds: what is read for ever ends this process
    resource.setrlimit(resource.RLIMIT_AS, (kilobytes("VmSize") * 1024 + (4 << 30),) * 2)
    before, began = kilobytes("VmRSS"), time.monotonic()
    try:
        said = str(readers["read_" + kind](path))
    except ValueError as error:
        said = str(error)
    risen = (kilobytes("VmHWM") - before) * 1024
    print(json.dumps([name, [risen, time.monotonic() - began, said[:2000]]]), flush=True)
    os._exit(0)
"""
