"""What a run is, beside its weights: the step it stands at and everything that decides what comes next."""

from dataclasses import dataclass, replace
from typing import Any

from data.batch import commit
from data.collate import wrap_int64
from data.lanes import Cursor, Damage, StreamState
from data.phases import Phase


@dataclass(frozen=True)
class TrainState:
    """Between two optimizer steps. There is no generator state: dropout is keyed by (seed, row)."""

    step: int  # completed optimizer steps
    num_tokens: int  # filled slots trained on so far, over all ranks
    rows_digest: (
        int  # sum of the digests of all rows so far: equal for any number of ranks and workers
    )
    stream: StreamState
    phases: tuple[Phase, ...] = ()  # all so far; the last one is under way
    num_skipped_steps: int = (
        0  # whose gradient was not finite: their rows are gone by, the weights stayed
    )

    def advance(
        self,
        num_tokens: int,
        digest: int,
        cursors: dict[int, Cursor],
        damage: list[Damage],
        *,
        skipped: bool = False,
    ) -> "TrainState":
        """The state after one completed step. cursors: lanes this rank has moved; damage: of all ranks."""
        row = self.stream.row + self.phases[-1].global_batch_size
        return replace(
            self,
            step=self.step + 1,
            num_tokens=self.num_tokens + num_tokens,
            rows_digest=wrap_int64(self.rows_digest + digest),
            stream=commit(self.stream, row, cursors, damage),
            num_skipped_steps=self.num_skipped_steps + skipped,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "num_tokens": self.num_tokens,
            "rows_digest": self.rows_digest,
            "stream": self.stream.to_json(),
            "phases": [phase.to_json() for phase in self.phases],
            "num_skipped_steps": self.num_skipped_steps,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainState":
        """ValueError for what `to_json` does not give."""
        try:
            return cls(
                value["step"],
                value["num_tokens"],
                value["rows_digest"],
                StreamState.from_json(value["stream"]),
                tuple(Phase.from_json(phase) for phase in value["phases"]),
                value.get("num_skipped_steps", 0),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"a state is not laid out as this version does it: {type(error).__name__} {error}"
            ) from None


def moved_lanes(state: TrainState, started_from: StreamState) -> dict[int, Cursor]:
    """The lanes this rank has read from since the job started."""
    lanes = zip(state.stream.cursors, started_from.cursors, strict=True)
    return {lane: now for lane, (now, before) in enumerate(lanes) if now != before}


def merge_ranks(state: TrainState, moved: list[dict[int, Cursor]]) -> TrainState:
    """The run's state from one rank's and every rank's moved lanes: a lane belongs to one rank."""
    cursors = {lane: cursor for part in moved for lane, cursor in part.items()}
    return replace(state, stream=commit(state.stream, state.stream.row, cursors))
