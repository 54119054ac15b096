"""Tensors of a batch in; one error out that names all that is out of range. For CPUs: it looks at values."""

import torch


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
