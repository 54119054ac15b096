"""Rows in, the tensors of a micro-batch out: padding, and what every task asks of its slots."""

# B rows, L slots of a row, N labels of a task

from typing import Any, NamedTuple

import numpy as np
import torch

from data.objectives import DEFAULT_MIXTURE, PAIRED, TASKS, Mixture
from data.pairs import UNLABELLED
from data.rows import Row

STARTS_AT_ONCE = 64  # Batch.sequence_starts is as long as a multiple of this
FIRST_ASKED = Row._fields.index("asked_slots")
OF_TWO_SLOTS = ("relative", "cpc")


class Target(NamedTuple):
    """What one task asks of a micro-batch."""

    slots: torch.Tensor  # int64 [N], into the B * L slots; [N, 2] of tasks that ask of two slots
    labels: torch.Tensor  # int64 [N]: tokens or classes


class Batch(NamedTuple):
    """One micro-batch. The tensors are the model's inputs."""

    input_ids: torch.Tensor  # int64 [B, L]
    token_type_ids: torch.Tensor  # int64 [B, L]
    position_ids: torch.Tensor  # int64 [B, L], from 0 in every sequence
    sequence_ids: torch.Tensor  # int32 [B, L]: 0, 1, ... along the row, -1 at padding
    targets: dict[str, Target]  # of every task of the mixture, in the order of TASKS, maybe empty
    sequence_starts: (
        torch.Tensor
    )  # int32: slots of B * L at which sequences and padding begin, then B * L
    visible: torch.Tensor | None  # int32 [B, L]: the last slot of the row that each slot attends to
    sequence_lengths: np.ndarray  # int64 [number of sequences]
    sequence_rows: np.ndarray  # int64 [number of sequences]: the row of the batch that each lies in
    rows_digest: int  # int64: sum of the rows' digests, modulo 2^64

    @property
    def num_tokens(self) -> int:
        """Filled slots."""
        return int(self.sequence_lengths.sum())

    @property
    def num_labels(self) -> dict[str, int]:
        """Of each task."""
        return {task: len(target.labels) for task, target in self.targets.items()}

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory, from which a GPU copies while it computes."""
        pinned = {
            name: value.pin_memory()
            for name, value in self._asdict().items()
            if isinstance(value, torch.Tensor)
        }
        targets = {
            task: Target(*(tensor.pin_memory() for tensor in target))
            for task, target in self.targets.items()
        }
        return self._replace(**pinned, targets=targets)

    def model_inputs(self, device: torch.device) -> dict[str, Any]:
        """The model's keyword arguments, on `device`."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return {
            "input_ids": moved(self.input_ids),
            "token_type_ids": moved(self.token_type_ids),
            "position_ids": moved(self.position_ids),
            "sequence_ids": moved(self.sequence_ids),
            "targets": {
                task: (moved(index), moved(labels))
                for task, (index, labels) in self.targets.items()
            },
            "sequence_starts": moved(self.sequence_starts),
            "visible": None if self.visible is None else moved(self.visible),
        }


def collate(
    rows: list[Row],
    numbers: list[int],
    sequence_length: int,
    pad_id: int,
    mixture: Mixture = DEFAULT_MIXTURE,
) -> Batch:
    """Pad rows to `sequence_length` and lay them side by side. numbers: each row's place in the run.

    mixture: that the rows were made with.
    """
    joined = _joined(rows)
    num_filled = np.array([len(row.input_ids) for row in rows])
    filled = np.arange(sequence_length) < num_filled[:, None]

    def padded(values: np.ndarray, padding: int, dtype: type = np.int64) -> torch.Tensor:
        slots = np.full(filled.shape, padding, dtype=dtype)
        slots[filled] = values
        return torch.from_numpy(slots)

    offsets = np.arange(len(rows)) * sequence_length
    lengths = joined.sequence_lengths
    shift = offsets - (np.cumsum(num_filled) - num_filled)
    starts = np.cumsum(lengths) - lengths
    position_ids = np.arange(int(num_filled.sum())) - np.repeat(starts, lengths)
    num_sequences = np.array([len(row.sequence_lengths) for row in rows])
    sequence_rows = np.repeat(np.arange(len(rows)), num_sequences)
    in_row = np.arange(len(lengths)) - (np.cumsum(num_sequences) - num_sequences)[sequence_rows]
    starts += shift[sequence_rows]
    return Batch(
        padded(joined.input_ids, pad_id),
        padded(joined.token_type_ids, 0),
        padded(position_ids, 0),
        padded(np.repeat(in_row, lengths), -1, np.int32),
        _targets(rows, joined, offsets, starts, mixture),
        _segment_starts(starts, num_filled, sequence_length),
        padded(joined.seen, sequence_length - 1, np.int32) if mixture.is_causal else None,
        sequence_lengths=lengths,
        sequence_rows=sequence_rows,
        rows_digest=wrap_int64(sum(map(Row.digest, rows, numbers))),
    )


def _joined(rows: list[Row]) -> Row:
    """Each field of all rows. Most rows ask for nothing besides, which is not worth joining."""
    fields = zip(*rows, strict=True)
    return Row(
        *(
            arrays[0]
            if number >= FIRST_ASKED and not any(map(len, arrays))
            else np.concatenate(arrays)
            for number, arrays in enumerate(fields)
        )
    )


def _targets(
    rows: list[Row], joined: Row, offsets: np.ndarray, starts: np.ndarray, mixture: Mixture
) -> dict[str, Target]:
    """offsets: the first slot of each row; starts: that of each sequence."""
    recipes = {recipe.key: recipe for recipe in mixture.recipes}
    of_rows = [recipes[key] for key in joined.recipe.tolist()]

    def repeated(values: list | np.ndarray, field: str) -> np.ndarray:
        return np.repeat(values, [len(getattr(row, field)) for row in rows])

    masked = joined.masked_positions + repeated(offsets, "masked_positions")
    masked_tasks = {recipe.masked_task for recipe in mixture.recipes}
    targets = {}
    for task in mixture.tasks:
        if task in masked_tasks:
            index, labels = masked, joined.masked_labels
            if len(masked_tasks) > 1:
                own = repeated([recipe.masked_task == task for recipe in of_rows], "masked_labels")
                index, labels = index[own], labels[own]
        elif task in PAIRED:
            own = joined.pair_labels != UNLABELLED
            if len(recipes) > 1:
                own &= repeated([recipe.paired == task for recipe in of_rows], "pair_labels")
            index, labels = starts[own], joined.pair_labels[own]
        else:
            own = joined.asked_tasks == TASKS.index(task)
            index = joined.asked_slots[own] + repeated(offsets, "asked_labels")[own, None]
            index, labels = index if task in OF_TWO_SLOTS else index[:, 0], joined.asked_labels[own]
        targets[task] = Target(
            torch.from_numpy(np.ascontiguousarray(index)),
            torch.from_numpy(labels.astype(np.int64, copy=False)),
        )
    return targets


def _segment_starts(
    starts: np.ndarray, num_filled: np.ndarray, sequence_length: int
) -> torch.Tensor:
    """Where each sequence, and the padding of each row, begins; the end as often as fills up a round number.

    So the tensor has few different lengths, and what is compiled for one fits the next batch.
    """
    num_rows = len(num_filled)
    padding = (np.arange(num_rows) * sequence_length + num_filled)[num_filled < sequence_length]
    bounds = np.sort(np.concatenate([starts, padding]))
    num_bounds = -(-(len(bounds) + 1) // STARTS_AT_ONCE) * STARTS_AT_ONCE
    padded = np.full(num_bounds, num_rows * sequence_length, dtype=np.int32)
    padded[: len(bounds)] = bounds
    return torch.from_numpy(padded)


def wrap_int64(value: int) -> int:
    """`value` modulo 2^64, as a signed 64-bit integer."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
