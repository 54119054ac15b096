"""Engine in, a copy of its state in host memory out; and a checkpoint folder back into an engine.

    checkpoints/step-00000120/
        train_state-00000-of-00002.safetensors   fp32, by name: master/<p>, exp_avg/<p>, exp_avg_sq/<p>
        state.json                               step, tokens, stream cursors, configuration, digests
        hf/                                      the model as `transformers` loads it
        MANIFEST.json                            size and sha256 of every file, written last

Every rank writes what its optimizer owns, a run of a flattened tensor where ZeRO's partition cuts it;
any stage and world size reads that. Nothing is a pickle. The folder is written under a temporary
name, and one rename publishes it.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from trainer.checkpoint_files import (
    checkpoints_folder,
    list_checkpoints,
    problems_of,
    read_state,
    step_of,
)
from trainer.engine import NamedState
from trainer.files import free_bytes, no_space, remove_folder, size_of
from trainer.fragments import local_fragments, share_out
from trainer.saved_tensors import SavedTensors, key_of
from trainer.state import TrainState
from trainer.world import World

BYTES_PER_VALUE = 4


def shapes_of(named: NamedState) -> dict[str, torch.Size]:
    return {name: named.shape(name) for name in named.parameters}


def check_room(
    temporary: Path, named: NamedState, world: World, keep: Callable[[int], bool]
) -> str | None:
    """Make the folder of a checkpoint to come; or say why not, the same on every rank. Collective.

    Where space is short, older checkpoints but the newest and those to `keep` make room.
    """
    problem = None
    if world.is_main:
        values = sum(shape.numel() * len(named.parts(n)) for n, shape in shapes_of(named).items())
        values += sum(shape.numel() for shape in shapes_of(named).values())  # hf/
        try:
            problem = _make_room(temporary, values * BYTES_PER_VALUE, keep)
            if problem is None:
                temporary.mkdir()
        except OSError as error:
            problem = str(error)
    return world.broadcast(problem)


def _make_room(temporary: Path, needed: int, keep: Callable[[int], bool]) -> str | None:
    folder = temporary.parent
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [*folder.glob(".tmp-*"), *folder.glob(".trash-*")]:
        shutil.rmtree(stale)
    *older, newest = list_checkpoints(folder.parent) or [None]
    if newest is not None:
        needed = max(needed, size_of(newest))  # as large as this one will be
    for old in older:
        if old is None or free_bytes(folder) >= needed:
            break
        if not keep(step_of(old)):
            print(f"space is short: {old} is deleted", flush=True)
            remove_folder(old)
    return no_space(folder, needed, "a checkpoint") if free_bytes(folder) < needed else None


def copy_to_host(named: NamedState, world: World, host: dict[str, torch.Tensor]) -> None:
    """Fill `host` with what this rank's optimizer owns, by key of the file. Collective.

    host: the memory of the last copy is used again. ValueError, on every rank, where a value is not finite.
    """
    owners = share_out(
        {name: shape.numel() for name, shape in shapes_of(named).items()}, world.size
    )
    flags, keys = [], []
    for name, part, start, values in local_fragments(named):
        if named.stage == 0 and owners[name] != world.rank:
            continue
        shape = named.shape(name)
        is_whole = len(values) == shape.numel()
        key = key_of(part, name, start, is_whole)
        if key not in host:
            host[key] = torch.empty(
                shape if is_whole else values.shape,
                dtype=torch.float32,
                pin_memory=world.device.type == "cuda",
            )
        host[key].view(-1).copy_(values, non_blocking=True)
        flags.append(torch.stack(torch.aminmax(values)))  # one pass; NaN shows in both
        keys.append(f"{part} of {name}")
    finite = torch.stack(flags).isfinite().all(1).tolist() if flags else []  # waits for the device
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    wrong = [key for key, is_finite in zip(keys, finite, strict=True) if not is_finite]
    if everyone := sorted({key for part in world.gather(wrong) for key in part}):
        raise ValueError(
            f"NaN or infinity in {', '.join(everyone[:5])}: no checkpoint is written of this"
        )


def newest_valid(run_dir: Path, world: World, before: int | None = None) -> Path | None:
    """The newest checkpoint that verifies, the same on every rank; None when there is none at all.

    before: a step that it must not have passed. Rank 0 looks and reports each rejected one. ValueError
    when there are checkpoints and none is valid: a run never starts from nothing beside its own, damaged
    past. Collective.
    """
    found: Path | None = None
    rejected: list[str] = []
    if world.is_main:
        for folder in reversed(list_checkpoints(run_dir)):
            if before is not None and step_of(folder) > before:
                continue
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
    """Load a verified checkpoint into an engine of any ZeRO stage and world size. Collective.

    Each rank reads what its optimizer owns. ValueError where the tensors are not this model's.
    """
    document = read_state(folder)
    named.begin_load(document["optimizer_step"])
    expected = {
        f"{part}/{name}": shape.numel()
        for name, shape in shapes_of(named).items()
        for part in named.parts(name)
    }
    with SavedTensors(folder) as saved:
        if problems := saved.problems(expected):
            more = f" ({len(problems)} in all)" if len(problems) > 5 else ""
            raise ValueError(f"{folder} is of another model: {'; '.join(problems[:5])}{more}")
        for name, part, start, values in local_fragments(named):
            values.copy_(saved.read(f"{part}/{name}", start, start + len(values)))
    named.refresh()
    return TrainState.from_json(document)
