"""A run's folder in, the stream as it stood before any of its steps out: what was trained on, read again.

Cursors of the nearest checkpoint are moved forward by lengths alone; phases are entered as the run did.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.batch import commit
from data.lanes import Damage, DataConfig, Lanes, Origin, StreamState
from data.phases import Phase, enter
from data.rows import Row
from data.settings import read_settings
from data.shards import Dataset
from trainer.checkpoint_files import list_checkpoints, read_state
from trainer.config import RunConfig, config_from
from trainer.files import sha256_of
from trainer.jumps import Jump, read_jumps
from trainer.phases import settings_at
from trainer.run_folder import DAMAGE_FILE
from trainer.state import TrainState


@dataclass(frozen=True)
class RunHistory:
    """What a run's folder tells of its stream."""

    folder: Path
    config: RunConfig
    states: tuple[TrainState, ...]  # of the checkpoints that are kept, oldest first
    digests: dict[int, int]  # step -> sum of the digests of all rows up to it, as logged
    damage: tuple[Damage, ...]  # readings of blocks that were passed over
    jumps: tuple[Jump, ...] = ()  # where rewinds have moved the stream

    @property
    def last_step(self) -> int:
        return max(self.digests)

    @classmethod
    def read(cls, folder: Path) -> "RunHistory":
        """ValueError when the folder holds no run, or a checkpoint whose state is not what was written."""
        path = folder / "config.yaml"
        if not path.is_file():
            raise ValueError(f"{folder} is no run: it has no config.yaml")
        config = config_from(read_settings(path, "settings"), source=str(path))
        states = tuple(map(_read_checkpoint, list_checkpoints(folder)))
        digests = {0: 0} | _logged(folder / "metrics.jsonl")
        digests |= {state.step: state.rows_digest for state in states}
        damage = {d for state in states for d in state.stream.damage} | _ledger(
            folder / DAMAGE_FILE
        )
        jumps = tuple(read_jumps(folder))
        return cls(folder, config, states, digests, tuple(sorted(damage)), jumps)

    def start(self, step: int) -> TrainState | None:
        """The newest checkpoint's state at or before `step` completed steps; None: the run's start."""
        return max(
            (s for s in self.states if s.step <= step), key=lambda state: state.step, default=None
        )

    def phases(self, datasets: list[Dataset]) -> tuple[Phase, ...]:
        """All phases up to the end of the run, those after the newest checkpoint by the configuration.

        datasets: the newest last. Without the checkpoint's own dataset among them nothing is known of
        the steps after it: was the dataset changed, or another one taken?
        """
        known = self.states[-1].phases if self.states else ()
        if known and known[-1].dataset_digest not in {dataset.digest for dataset in datasets}:
            return known
        since = self.states[-1].step if self.states else 0
        row = self.states[-1].stream.row if self.states else 0
        phases = list(known)
        jumps = {jump.step: jump.stream.row for jump in self.jumps}
        begin = {since, *jumps, *(phase.first_step for phase in self.config.phases)}
        for step in sorted(step for step in begin if step >= since):
            settings = settings_at(self.config, step)
            if phases and step > since:
                row = phases[-1].first_row_of(step)
            is_jump = jumps.get(step, 0) > row
            row = max(row, jumps.get(step, 0))
            phase = Phase.of(settings.data, datasets[-1], settings.global_batch_size, step, row)
            is_new = not phases or is_jump or bool(phases[-1].differences(phase))
            if step < self.last_step and is_new:
                phases.append(phase)
        return tuple(phases)

    def logged_span(self, step: int) -> tuple[int, int, int]:
        """(first, last, digest): the least range of steps around `step` whose rows' digest was logged.

        Steps first + 1 to last, counted from 1; the digest is modulo 2^64.
        """
        first = max(s for s in self.digests if s < step)
        last = min(s for s in self.digests if s >= step)
        return first, last, (self.digests[last] - self.digests[first]) % (1 << 64)


def _read_checkpoint(folder: Path) -> TrainState:
    """The state, compared with the hash that the checkpoint's manifest has of it."""
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
        expected = manifest["files"]["state.json"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'MANIFEST.json'} cannot be read: {error}") from error
    if sha256_of(folder / "state.json") != expected:
        raise ValueError(f"{folder / 'state.json'} is damaged: move this checkpoint away")
    document = read_state(folder)
    if "phases" not in document:
        raise ValueError(
            f"{folder} was written by a version of Cloze that kept no record of phases"
        )
    return TrainState.from_json(document)


def _logged(path: Path) -> dict[int, int]:
    if not path.is_file():
        return {}
    values = _json_lines(path)
    return {v["step"]: v["rows_digest"] for v in values if v["kind"] == "train"}


def _ledger(path: Path) -> set[Damage]:
    if not path.is_file():
        return set()
    return {Damage(v["lane"], v["window"], v["block"]) for v in _json_lines(path)}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The last line of a killed job may be cut."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Replay:
    """The rows of a run's steps, asked for in ascending order. Only lanes that are asked for are read.

    datasets: those that the run has read, newest last. ValueError when one is missing, or was changed.
    """

    def __init__(self, history: RunHistory, datasets: list[Dataset], step: int) -> None:
        """step: 1 is the run's first. Nothing before it can be asked for."""
        self.history = history
        self._datasets = {dataset.digest: dataset for dataset in datasets}
        self.phases = history.phases(datasets)
        self.start = history.start(step - 1)
        known = self.start.phases if self.start else self.phases[:1]
        if known != self.phases[: len(known)]:
            raise ValueError(
                f"the checkpoint of {history.folder} before step {step} has other phases than the newest one: "
                "the folder holds checkpoints of two runs. Move those of one away"
            )
        self._index = len(known) - 1  # of the phase that self._state is in
        fresh = StreamState.start(history.config.data.num_lanes, len(self.phases[0].sources))
        stream = self.start.stream if self.start else fresh
        self._state = commit(stream, stream.row, {}, history.damage)
        self._lanes: Lanes | None = None
        self._given: dict[int, int] = {}  # lane -> the last row that was asked for

    def phase_of(self, step: int) -> Phase:
        return [phase for phase in self.phases if phase.first_step < step][-1]

    def rows_of(self, step: int) -> range:
        """Numbers of the rows that step `step` was trained on."""
        phase = self.phase_of(step)
        first = phase.first_row_of(step - 1)
        return range(first, first + phase.global_batch_size)

    def dataset_of(self, step: int) -> Dataset:
        return self._dataset(self.phase_of(step))

    def enter(self, step: int, wanted: set[int]) -> None:
        """Make rows of `step` ready to be asked for. wanted: the lanes that will be, in this step and later."""
        target = self.phases.index(self.phase_of(step))
        while self._index < target:
            following = self.phases[self._index + 1]
            self._move(following.first_row, wanted)
            self._state, _ = enter(self._state, self.phases[self._index], following)
            self._index, self._lanes = self._index + 1, None

    def origin(self, number: int) -> Origin:
        """Where a row of the step that was entered comes from. Each row can be asked for once."""
        self._given[number % self.history.config.data.num_lanes] = number
        return self._open().origin(number)

    def row(self, number: int) -> Row:
        """The row itself, as it was trained on. Each row can be asked for once."""
        self._given[number % self.history.config.data.num_lanes] = number
        return self._open().row(number)

    def _open(self) -> Lanes:
        if self._lanes is None:
            phase = self.phases[self._index]
            config = self._config(phase)
            self._lanes = Lanes(self._dataset(phase), config, self.history.config.seed, self._state)
        return self._lanes

    def _config(self, phase: Phase) -> DataConfig:
        return replace(
            self.history.config.data,
            sequence_length=phase.sequence_length,
            packing=phase.packing,
            objectives=phase.objectives,
            masked_fraction=phase.masked_fraction,
            mask_token_share=phase.mask_token_share,
            random_token_share=phase.random_token_share,
            weights=phase.weights,
            max_damaged_blocks=0,  # passed over is what the run has passed over, and nothing else
        )

    def _move(self, row: int, wanted: set[int]) -> None:
        """Move the wanted lanes to where they stand when the run's rows before `row` are given."""
        lanes, num_lanes = self._open(), self.history.config.data.num_lanes
        cursors = {}
        for lane in wanted:
            last = row - 1 - (row - 1 - lane) % num_lanes
            if last >= self._state.row and last > self._given.get(lane, -1):
                lanes.origin(last)
            cursors[lane] = lanes.cursor(lane)
        self._state = commit(self._state, row, cursors)

    def _dataset(self, phase: Phase) -> Dataset:
        found = self._datasets.get(phase.dataset_digest)
        if found is None:
            given = ", ".join(f"{d.place} ({digest})" for digest, d in self._datasets.items())
            raise ValueError(
                f"steps from {phase.first_step + 1} on were trained on the dataset with digest "
                f"{phase.dataset_digest}, and this is {given}: it was changed since, prepared anew, or is "
                "another one. Give the one that was trained on: --dataset PATH (more than once where the "
                "run has read several)"
            )
        return found
