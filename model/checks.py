"""Tensors of a batch in; one error out that names all that is out of range. For CPUs: it looks at values."""

from collections.abc import Iterable, Mapping

import torch

from model.tasks import TASKS


def check_ranges(**tensors_and_limits: tuple[torch.Tensor, int]) -> None:
    """ValueError unless the integers of each tensor are in [0, limit)."""
    problems = []
    for name, (values, limit) in tensors_and_limits.items():
        if values.numel() == 0:
            continue
        low, high = (int(bound) for bound in values.aminmax())
        if low < 0 or high >= limit:
            problems.append(f"{name} holds {low} to {high}, it must be in 0 to {limit - 1}")
    if problems:
        raise ValueError("the batch does not fit the model: " + "; ".join(problems))


def check_starts(sequence_starts: torch.Tensor | None, num_slots: int) -> None:
    """ValueError unless they ascend from 0 to the number of slots; None is allowed."""
    if sequence_starts is None:
        return
    starts = sequence_starts.tolist()
    if starts[:1] != [0] or starts[-1] != num_slots or starts != sorted(starts):
        shown = ", ".join(map(str, starts[:8])) + (", ..." if len(starts) > 8 else "")
        raise ValueError(
            f"sequence_starts must ascend from 0 to {num_slots}, the slots, and is {shown}"
        )


def check_targets(
    targets: Mapping[str, tuple[torch.Tensor, torch.Tensor]], tasks: tuple[str, ...]
) -> None:
    """ValueError unless there are targets of these tasks alone, each a label for each index."""
    problems = []
    if set(targets) != set(tasks):
        problems.append(f"there are targets of {_names(targets)}, the tasks are {_names(tasks)}")
    for task, (index, labels) in targets.items():
        width = TASKS[task].index_width if task in TASKS else 1
        expected = [len(labels)] if width == 1 else [len(labels), width]
        if labels.ndim != 1 or list(index.shape) != expected:
            problems.append(
                f"{task} index {list(index.shape)} and labels {list(labels.shape)} differ"
                + ("" if width == 1 else f": the index has {width} slots for each label")
            )
    if problems:
        raise ValueError("the targets do not fit the model: " + "; ".join(problems))


def _names(tasks: Iterable[str]) -> str:
    return ", ".join(sorted(tasks)) or "none"


def check_visible(visible_BL: torch.Tensor | None, sequence_ids_BL: torch.Tensor) -> None:
    """ValueError where a slot that holds a token sees less than itself, or beyond its row."""
    if visible_BL is None:
        return
    if visible_BL.shape != sequence_ids_BL.shape:
        raise ValueError(
            f"visible is {list(visible_BL.shape)}, the rows are {list(sequence_ids_BL.shape)}"
        )
    length = visible_BL.shape[1]
    is_wrong = (visible_BL < torch.arange(length)) | (visible_BL >= length)
    if (is_wrong := is_wrong & (sequence_ids_BL >= 0)).any():
        row, slot = is_wrong.nonzero()[0].tolist()
        raise ValueError(
            f"visible of row {row}, slot {slot} is {int(visible_BL[row, slot])}: it must be in "
            f"{slot}, the slot itself, to {length - 1}"
        )
