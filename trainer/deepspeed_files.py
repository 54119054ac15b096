"""A checkpoint as DeepSpeed writes it in, fp32 weights and Adam moments by parameter name out.

    FOLDER/latest                                    names the newest tag
    FOLDER/TAG/mp_rank_00_model_states.pt            stages 1, 2: shapes, steps
               zero_pp_rank_R_mp_rank_00_model_states.pt             stage 3
               [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt      a rank's part of masters and moments
    FOLDER/TAG/zero/NAME/fp32.pt exp_avg.pt exp_avg_sq.pt            universal: whole tensors

These files are pickles. They are read by torch's restricted unpickler, which makes tensors and plain
containers only, and the three classes of DeepSpeed named here, as empty stand-ins: DeepSpeed is not imported,
and nothing that a file names can run.
"""

import enum
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZER = "optimizer_state_dict"
OPTIM_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class LossScaler:
    """Stands for deepspeed.runtime.fp16.loss_scaler's: its fields are set, and never looked at."""


class ZeroStageEnum(int, enum.Enum):
    """Stands for deepspeed.runtime.zero.config's."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


@dataclass
class Fragment:
    """Stands for deepspeed.utils.tensor_fragment's fragment_address: a part of a rank's flat tensor."""

    numel: int
    start: int


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (ZeroStageEnum, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
]


class DeepSpeedState(NamedTuple):
    """All in fp32, by the names of the model that was trained."""

    step: int  # of the run
    optimizer_step: int  # of Adam: behind the run's where steps were skipped
    parts: dict[str, dict[str, torch.Tensor]]  # name -> master, exp_avg, exp_avg_sq


def read_deepspeed(folder: Path) -> DeepSpeedState:
    """A tag's folder, or the one above it, whose newest tag is taken. ValueError: why it cannot be read."""
    folder = _tag_folder(folder)
    model_files = [folder / name for name in MODEL_FILES if (folder / name).is_file()]
    if not model_files:
        raise ValueError(f"{folder} is no DeepSpeed checkpoint: it has none of {MODEL_FILES}")
    model = load_safely(model_files[0])
    try:
        if (folder / "zero").is_dir():
            return _universal(folder / "zero", model)
        return _of_ranks(folder, model)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{folder} is not laid out as DeepSpeed 0.19.8 does it: {type(error).__name__} {error}"
        ) from error


def load_safely(path: Path) -> Any:
    """What a .pt file holds, if that is tensors and plain values. ValueError naming what is more than that."""
    _refuse_packed(path)
    try:
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        named = re.search(r"(?:GLOBAL|global|Unsupported class) ([\w.]+)", str(error))
        reason = f"it names {named[1]}" if named else str(error).strip().splitlines()[0][:300]
        raise ValueError(
            f"{path} was not loaded, for it is damaged or more than tensors and plain values: {reason}"
        ) from None


def _refuse_packed(path: Path) -> None:
    """ValueError where a .pt file's members unpack to more than the file: torch would unpack them in memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > (nbytes := path.stat().st_size):
        raise ValueError(
            f"{path} was not loaded: its {nbytes:,} bytes unpack to {unpacked:,}, which DeepSpeed's never do"
        )


def _tag_folder(folder: Path) -> Path:
    for pointer in ("latest_universal", "latest"):
        path = folder / pointer
        if path.is_file():
            tag = path.read_text(encoding="utf-8", errors="replace").strip()
            if not TAG.fullmatch(tag) or not (folder / tag).is_dir():
                raise ValueError(f"{path} names {tag[:200]!r}, which is no folder beside it")
            return folder / tag
    return folder


def _shapes(model: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {
        name: torch.Size(shape) for group in model["param_shapes"] for name, shape in group.items()
    }


def _of_ranks(folder: Path, model: Mapping[str, Any]) -> DeepSpeedState:
    found = {path: OPTIM_FILE.fullmatch(path.name) for path in folder.iterdir()}
    ranks = {int(name[1]): path for path, name in found.items() if name and int(name[2]) == 0}
    if any(name and int(name[2]) for name in found.values()):
        raise ValueError(f"{folder} is of a model divided by tensor parallelism: not supported")
    if not ranks:
        raise ValueError(
            f"{folder} has no optimizer states of ZeRO 1, 2 or 3. Of stage 0 there is the model only: "
            "export it as a Hugging Face folder, and give that as init_from"
        )
    expected = model.get("dp_world_size") or len(ranks)
    if sorted(ranks) != list(range(expected)):
        raise ValueError(f"{folder} has the states of ranks {sorted(ranks)}, of {expected} ranks")
    states = [load_safely(ranks[rank])[OPTIMIZER] for rank in sorted(ranks)]
    if "fp32_flat_groups" in states[0]:
        parts, inner = _stage_3(states, model), states[0][OPTIMIZER]
        steps = _steps(inner["state"].values(), inner["param_groups"])
    else:
        parts, inner = _stages_1_and_2(states, _shapes(model)), states[0]["base_optimizer_state"]
        steps = _steps(
            _group_states(states[0]), [] if isinstance(inner, list) else inner["param_groups"]
        )
    return _state(model, steps, parts)


def _state(
    model: Mapping[str, Any], steps: set[int], parts: dict[str, dict[str, torch.Tensor]]
) -> DeepSpeedState:
    step = int(model["global_steps"])
    taken = steps or {step - int(model.get("skipped_steps") or 0)}
    if len(taken) > 1:
        raise ValueError(f"parameters are at different optimizer steps: {sorted(taken)}")
    return DeepSpeedState(step, taken.pop(), parts)


def _steps(states: Iterable[Mapping[str, Any]], groups: Iterable[Mapping[str, Any]]) -> set[int]:
    """Of torch's optimizers the state of each tensor has it, of DeepSpeed's own its group."""
    return {int(holder["step"]) for holder in [*states, *groups] if "step" in holder}


def _group_states(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One per parameter group; "elastic" checkpoints have a list, others the optimizer's own dictionary."""
    inner = state["base_optimizer_state"]
    return inner if isinstance(inner, list) else [s for _, s in sorted(inner["state"].items())]


def _stages_1_and_2(
    states: Sequence[Mapping[str, Any]], shapes: Mapping[str, torch.Size]
) -> dict[str, dict[str, torch.Tensor]]:
    """Each rank holds a stretch of every group's flat tensor, and tells which parameters lie where in it."""
    pieces: dict[str, dict[str, list[torch.Tensor]]] = {name: {} for name in shapes}
    for state in states:
        masters, moments = state["single_partition_of_fp32_groups"], _group_states(state)
        for number, where in enumerate(state["param_slice_mappings"]):
            flat = {"master": masters[number], **{key: moments[number][key] for key in MOMENTS}}
            for name, fragment in where.items():
                for part, tensor in flat.items():
                    piece = tensor.narrow(0, fragment.start, fragment.numel)
                    pieces[name].setdefault(part, []).append(piece)
    return {name: _joined(name, pieces[name], shape) for name, shape in shapes.items()}


def _stage_3(
    states: Sequence[Mapping[str, Any]], model: Mapping[str, Any]
) -> dict[str, dict[str, torch.Tensor]]:
    """Each rank holds as much of every parameter as any other; the last ones are padded."""
    if states[0].get("ds_zero_partition_groups"):
        raise ValueError("it is of a model divided by expert parallelism: not supported")
    parts = {}
    for number, group in enumerate(model["param_shapes"]):
        offset = 0
        for name, shape in group.items():
            share = -(-torch.Size(shape).numel() // len(states))
            pieces: dict[str, list[torch.Tensor]] = {}
            for state in states:
                moments = state[OPTIMIZER]["state"][number]
                flat = {"master": state["fp32_flat_groups"][number]}
                for part, tensor in (flat | {key: moments[key] for key in MOMENTS}).items():
                    pieces.setdefault(part, []).append(tensor.narrow(0, offset, share))
            parts[name] = _joined(name, pieces, torch.Size(shape), is_padded=True)
            offset += share
    return parts


def _joined(
    name: str,
    pieces: Mapping[str, Sequence[torch.Tensor]],
    shape: torch.Size,
    *,
    is_padded: bool = False,
) -> dict[str, torch.Tensor]:
    joined = {}
    for part in ("master", *MOMENTS):
        if any(piece.untyped_storage().nbytes() < piece.nbytes for piece in pieces.get(part, ())):
            raise ValueError(f"{part} of {name} has more values than were written")
        flat = torch.cat([piece.reshape(-1) for piece in pieces.get(part, ())] or [torch.empty(0)])
        flat = flat[: shape.numel()] if is_padded else flat
        if flat.numel() != shape.numel():
            raise ValueError(
                f"{part} of {name} has {flat.numel():,} values, its shape {list(shape)} needs {shape.numel():,}"
            )
        joined[part] = flat.to(torch.float32).view(shape)
    return joined


def _universal(folder: Path, model: Mapping[str, Any]) -> DeepSpeedState:
    """Whole tensors in a folder for each parameter; stage 3 leaves the step to a file of its own."""
    parts, steps = {}, set()
    for name, shape in _shapes(model).items():
        if not TAG.fullmatch(name):
            raise ValueError(f"{name[:200]!r} is no name of a parameter")
        pieces = {}
        for part, file in (("master", "fp32"), *((key, key) for key in MOMENTS)):
            path = folder / name / f"{file}.pt"
            if not path.is_file():
                raise ValueError(f"{path} is missing")
            value = load_safely(path)  # stage 3 leaves the tensor without a dictionary
            pieces[part] = [value["param"] if isinstance(value, dict) else value]
        parts[name] = _joined(name, pieces, shape)
        if (folder / name / "step.pt").is_file():
            steps.add(int(load_safely(folder / name / "step.pt")))
    if not steps and (folder / "optimizer_state.pt").is_file():
        common = load_safely(folder / "optimizer_state.pt")
        inner = common.get(OPTIMIZER, common)
        inner = inner.get(OPTIMIZER, inner)
        steps = _steps(inner.get("state", {}).values(), inner.get("param_groups", []))
    return _state(model, steps, parts)
