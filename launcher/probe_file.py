"""Lines of probes in, a run's probes.jsonl and TensorBoard scalars out; and what is there already.

A line begins with its kind: so one behind a line that a kill has cut is found by `launcher.jobs.json_lines`.
"""

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from launcher.probe_lines import PROBES_FILE, read_probes
from launcher.probe_task import FEATURES, PROBES

Key = tuple[str, str, str]  # hash of the weights, task, digest of its data


class ProbeFile:
    """probes.jsonl of a run, held by one process at a time; ValueError where another one has it."""

    def __init__(self, run: Path) -> None:
        self._run, self._writer = run, None
        path = run / PROBES_FILE
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(path, flags, 0o644), "ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(
                f"{path} is being written by another `cloze probe`: wait for it"
            ) from None
        if (written := path.read_bytes()) and not written.endswith(b"\n"):
            self._file.write(b"\n")  # behind what a killed process has cut
        self._found: dict[Key, set[tuple[str, str]]] = {}
        for line in read_probes(run):
            self._note(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()

    def has(self, key: Key) -> bool:
        """Whether every probe of a task on these weights and this data is there."""
        return len(self._found.get(key, ())) == len(PROBES) * len(FEATURES)

    def add(self, lines: list[dict[str, Any]]) -> None:
        """All lines of one task at one checkpoint, in one write."""
        lines = [{"kind": "probe", **line} for line in lines]
        self._file.write(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        )
        for line in lines:
            self._note(line)
        self._draw(lines)

    def _note(self, line: dict[str, Any]) -> None:
        key = (line["weights"], line["task"], line["data"])
        self._found.setdefault(key, set()).add((line["probe"], line["features"]))

    def _draw(self, lines: list[dict[str, Any]]) -> None:
        """Against tokens, in a folder of its own: TensorBoard follows one writer in each."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._run / "tensorboard" / "probes"))
        for line in lines:
            tag, place = f"probe/{line['task']}", line["num_tokens"]
            name = f"{line['probe']}_{line['features']}"
            self._writer.add_scalar(f"{tag}/{name}", line["accuracy"], place)
            if line["metric"] != "accuracy":
                self._writer.add_scalar(f"{tag}/{name}_{line['metric']}", line["score"], place)
        first = lines[0]
        tag = f"probe/{first['task']}/majority_class"
        self._writer.add_scalar(tag, first["majority_accuracy"], first["num_tokens"])
        self._writer.flush()
