"""Two phases of a run in, the stream's state at the second's first step out.

A phase is a stretch of steps with one batch size, one way of making rows, one mixture, one dataset.
Rows of a lane's open block cannot go on under another row length, so the lane then moves to its
next block, and what was left of the open one is counted. All else goes on to the row.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from data.lanes import Cursor, DataConfig, StreamState, next_window
from data.masking import MASK_SHARE, RANDOM_SHARE
from data.objectives import DEFAULT_RECIPE
from data.shards import Dataset
from data.sources import training_sources


@dataclass(frozen=True)
class Phase:
    """What decides the rows of a stretch of steps. Written into checkpoints."""

    first_step: int
    first_row: int
    global_batch_size: int
    sequence_length: int
    packing: bool
    masked_fraction: float
    weights: dict[str, int] | None
    sources: dict[str, int]  # the streams that are mixed -> their training blocks
    dataset_digest: str
    tokenizer_digest: str
    # checkpoints that are older than these had the defaults
    objectives: dict[str, int] = field(default_factory=lambda: {DEFAULT_RECIPE: 1})
    mask_token_share: float = MASK_SHARE
    random_token_share: float = RANDOM_SHARE

    @classmethod
    def of(
        cls, config: DataConfig, dataset: Dataset, global_batch_size: int, step: int, row: int
    ) -> "Phase":
        names, blocks = training_sources(dataset, config.weights)
        return cls(
            first_step=step,
            first_row=row,
            global_batch_size=global_batch_size,
            sequence_length=config.sequence_length,
            packing=config.packing,
            masked_fraction=config.masked_fraction,
            weights=config.weights,
            sources={name: len(rows) for name, rows in zip(names, blocks, strict=True)},
            dataset_digest=dataset.digest,
            tokenizer_digest=dataset.manifest["tokenizer"]["digest"],
            objectives=config.objectives,
            mask_token_share=config.mask_token_share,
            random_token_share=config.random_token_share,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Phase":
        return cls(**value)

    def first_row_of(self, step: int) -> int:
        """The first row of a step (0 is the run's first) of this phase, over all ranks."""
        return self.first_row + (step - self.first_step) * self.global_batch_size

    def differences(self, other: "Phase") -> list[str]:
        """'name: this -> other' where they differ, but for where they begin."""
        names = [field.name for field in fields(self)][2:]
        return [
            f"{name}: {getattr(self, name)!r} -> {getattr(other, name)!r}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]


def enter(state: StreamState, old: Phase, new: Phase) -> tuple[StreamState, list[str]]:
    """The stream at the first step of `new`, and what a person should know of the change.

    ValueError when the tokenizer is another one: the model's embeddings are of the old.
    """
    if old.tokenizer_digest != new.tokenizer_digest:
        raise ValueError(
            f"the tokenizer changed ({old.tokenizer_digest} -> {new.tokenizer_digest}): its ids mean other "
            "tokens than those the model was trained on. Prepare the new text with the old tokenizer "
            "(cloze prepare --tokenizer OLD-DATASET/tokenizer), or start a new run"
        )
    notes = []
    kept = [name for name in new.sources if old.sources.get(name) == new.sources[name]]
    anew = [name for name in new.sources if name in old.sources and name not in kept]
    if anew:
        notes.append(
            f"sources {anew} have other blocks than before: they begin at their first epoch"
        )
    decides = ("sequence_length", "packing", "objectives")  # which tokens are in which row
    same_rows = all(getattr(old, name) == getattr(new, name) for name in decides)
    goes_on = {index for index, name in enumerate(old.sources) if name in kept and same_rows}
    left = 0
    cursors = []
    for cursor in state.cursors:
        if cursor.source >= 0 and cursor.source not in goes_on:
            left += cursor.row > 0
            cursor = next_window(cursor)
        cursors.append(_renamed(cursor, list(old.sources), list(new.sources), kept))
    if left:
        notes.append(f"{left} of {len(cursors)} lanes leave the rest of their open block")
    return replace(state, cursors=tuple(cursors)), notes


def _renamed(cursor: Cursor, old: list[str], new: list[str], kept: list[str]) -> Cursor:
    """The cursor with its counts in the order of the new sources, 0 for those that are new."""
    counts = dict(zip(old, cursor.counts, strict=True))
    source = new.index(old[cursor.source]) if cursor.source >= 0 else -1
    return cursor._replace(
        source=source, counts=tuple(counts[name] if name in kept else 0 for name in new)
    )
