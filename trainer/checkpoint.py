"""Engine and state in, a checkpoint folder out, complete or absent; and back.

    checkpoints/step-00000120/
        train_state-00000-of-00002.safetensors   fp32, by name: master/<p>, exp_avg/<p>, ...
        state.json                               step, tokens, stream cursors, configuration, digests
        hf/                                      the model as `transformers` loads it
        MANIFEST.json                            size and sha256 of every file, written last

Every rank writes its share of the tensors; nothing in the files depends on ZeRO stage or world
size, and nothing in them is a pickle. The folder is written under a temporary name, and one rename
publishes it.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.files import sync_folder
from trainer.checkpoint_files import (
    FORMAT,
    checkpoints_folder,
    list_checkpoints,
    name_of,
    problems_of,
    read_state,
)
from trainer.engine import MASTER, NamedState
from trainer.files import (
    check_free_space,
    remove_folder,
    sha256_of,
    size_of,
    sync_file,
    write_atomically,
)
from trainer.state import TrainState
from trainer.world import World

# Writes the model as a Hugging Face folder; called on rank 0 with fp32 weights by our names.
WriteHf = Callable[[dict[str, torch.Tensor], Path], None]


def save(
    run_dir: Path, document: dict[str, Any], named: NamedState, world: World, write_hf: WriteHf
) -> Path:
    """Write and publish one checkpoint. Collective.

    document: for state.json: a TrainState's JSON and what else is to be compared at resume. When any
    rank fails, all raise the same error, nothing is published, and older checkpoints stay as they were.
    """
    final = checkpoints_folder(run_dir) / name_of(document["step"])
    temporary = final.with_name(world.broadcast(f".tmp-{final.name}-{uuid.uuid4().hex[:8]}"))
    sizes = {name: 4 * named.shape(name).numel() for name in named.parameters}
    needed_bytes = sum(
        size * (len(named.parts(name)) + 1) for name, size in sizes.items()
    )  # 1: hf/
    document = {"format": FORMAT, "optimizer_step": named.optimizer_step, **document}
    try:
        _agree(world, _prepare, temporary, needed_bytes, world)
        mine, weights = _gather(named, world)
        contents = {"document": document, "weights": weights, "write_hf": write_hf}
        written = _agree(world, _write_files, temporary, mine, contents, world)
        _agree(world, _publish, temporary, final, written, world)
    except (OSError, ValueError):
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _agree(world: World, action: Any, *arguments: Any) -> list[Any]:
    """Run `action` on every rank; all raise when one of them failed. Returns all results."""
    result, problem = None, None
    try:
        result = action(*arguments)
    except (OSError, ValueError, SafetensorError) as error:
        problem = f"rank {world.rank}: {error}"
    outcomes = world.gather((result, problem))
    problems = [problem for _, problem in outcomes if problem]
    if problems:
        raise OSError("the checkpoint was not written: " + "; ".join(problems))
    return [result for result, _ in outcomes]


def _prepare(temporary: Path, needed_bytes: int, world: World) -> None:
    if not world.is_main:
        return
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for stale in [*temporary.parent.glob(".tmp-*"), *temporary.parent.glob(".trash-*")]:
        shutil.rmtree(stale)
    previous = list_checkpoints(temporary.parent.parent)[-1:]  # as large as this one will be
    needed_bytes = max([needed_bytes, *map(size_of, previous)])
    check_free_space(temporary.parent, needed_bytes, "a checkpoint")
    temporary.mkdir()


def _gather(
    named: NamedState, world: World
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """This rank's share of all tensors, and on rank 0 every master weight. Collective."""
    mine: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    owners = share_out({name: named.shape(name).numel() for name in named.parameters}, world.size)
    not_finite = []
    for name in named.parameters:
        for part in named.parts(name):
            value = named.get(name, part)
            if not torch.isfinite(value).all():
                not_finite.append(f"{part} of {name}")
            if owners[name] == world.rank:
                mine[f"{part}/{name}"] = value.cpu().contiguous()
            if part == MASTER and world.is_main:
                weights[name] = value.cpu()
    if not_finite:
        raise ValueError(
            f"NaN or infinity in {', '.join(not_finite[:5])}: no checkpoint is written of this"
        )
    return mine, weights


def share_out(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """Which rank writes which tensor: the largest first, each to the rank with least so far."""
    loads, owners = [0] * world_size, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        owners[name] = rank
        loads[rank] += sizes[name]
    return owners


def _write_files(
    folder: Path, mine: dict[str, torch.Tensor], contents: dict[str, Any], world: World
) -> dict[str, dict[str, Any]]:
    """Write, sync and hash this rank's files. Returns {relative path: {bytes, sha256}}."""
    shard = folder / f"train_state-{world.rank:05d}-of-{world.size:05d}.safetensors"
    save_file(mine, shard)
    paths = [shard]
    if world.is_main:
        state, hf = folder / "state.json", folder / "hf"
        state.write_text(json.dumps(contents["document"]), encoding="utf-8")
        contents["write_hf"](contents["weights"], hf)
        paths += [state, *sorted(path for path in hf.rglob("*") if path.is_file())]
    for path in paths:
        sync_file(path)
    return {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_of(p)}
        for p in paths
    }


def _publish(
    temporary: Path, final: Path, written: list[dict[str, dict[str, Any]]], world: World
) -> None:
    if not world.is_main:
        return
    files = {name: facts for part in written for name, facts in part.items()}
    manifest = {"format": FORMAT, "files": dict(sorted(files.items()))}
    write_atomically(temporary / "MANIFEST.json", json.dumps(manifest, indent=1))
    if (temporary / "hf").is_dir():
        sync_folder(temporary / "hf")
    sync_folder(temporary)
    if final.exists():  # left by a job that was stopped between saving and going on
        remove_folder(final)
    os.rename(temporary, final)
    sync_folder(final.parent)


def newest_valid(run_dir: Path, world: World) -> Path | None:
    """The newest checkpoint that verifies, the same on every rank; None when there is none at all.

    Rank 0 looks and reports each rejected one. ValueError when there are checkpoints and none is
    valid: a run never starts from nothing beside its own, damaged past. Collective.
    """
    found: Path | None = None
    rejected: list[str] = []
    if world.is_main:
        for folder in reversed(list_checkpoints(run_dir)):
            problems = problems_of(folder)
            if not problems:
                found = folder
                break
            rejected += problems
            print(
                f"checkpoint {folder.name} is damaged and left aside: " + "; ".join(problems),
                flush=True,
            )
    found, rejected = world.broadcast((found, rejected))
    if found is None and rejected:
        raise ValueError(
            f"no checkpoint of {run_dir} is intact: "
            + "; ".join(rejected[:5])
            + ". Restore one, or delete "
            f"{checkpoints_folder(run_dir)} to start over."
        )
    return found


def restore(folder: Path, named: NamedState) -> TrainState:
    """Load a verified checkpoint into an engine of any ZeRO stage and world size. Collective."""
    document = read_state(folder)
    left = {f"{part}/{name}" for name in named.parameters for part in named.parts(name)}
    named.begin_load(document["optimizer_step"])
    for path in sorted(folder.glob("train_state-*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                part, _, name = key.partition("/")
                if key not in left:
                    raise ValueError(f"{path} holds {key}, which this model does not have")
                named.load(name, part, tensors.get_tensor(key).to(named.engine.device))
                left.discard(key)
    if left:
        raise ValueError(f"{folder} lacks {sorted(left)[:5]} ({len(left)} tensors in all)")
    named.end_load()
    return TrainState.from_json(document)
