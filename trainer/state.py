"""What a run is, beside its weights: the step it stands at and everything that decides what comes next."""

from dataclasses import dataclass, replace
from typing import Any

from data.batch import commit, wrap_int64
from data.lanes import Cursor, StreamState


@dataclass(frozen=True)
class TrainState:
    """Between two optimizer steps. There is no generator state: dropout is keyed by (seed, row)."""

    step: int  # completed optimizer steps
    num_tokens: int  # filled slots trained on so far, over all ranks
    rows_digest: int  # sum of the digests of all rows so far: equal for any number of ranks and workers
    stream: StreamState

    def advance(self, rows: int, num_tokens: int, digest: int, cursors: dict[int, Cursor]) -> "TrainState":
        """The state after one completed step of `rows` rows; `cursors`: lanes this rank has moved."""
        return replace(
            self,
            step=self.step + 1,
            num_tokens=self.num_tokens + num_tokens,
            rows_digest=wrap_int64(self.rows_digest + digest),
            stream=commit(self.stream, self.stream.row + rows, cursors),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "num_tokens": self.num_tokens,
            "rows_digest": self.rows_digest,
            "stream": self.stream.to_json(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainState":
        stream = StreamState.from_json(value["stream"])
        return cls(value["step"], value["num_tokens"], value["rows_digest"], stream)


def merge_ranks(states: list[TrainState], previous: StreamState) -> TrainState:
    """The run's state from every rank's: each lane was moved by one rank, or by none.

    previous: the stream state all ranks started this job from.
    """
    cursors = list(previous.cursors)
    for state in states:
        for lane, cursor in enumerate(state.stream.cursors):
            if cursor != previous.cursors[lane]:
                cursors[lane] = cursor
    return replace(states[0], stream=StreamState(states[0].stream.row, tuple(cursors)))
