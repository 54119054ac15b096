"""The state between two steps in, a checkpoint out that is written while training goes on.

Training waits for the copy to host memory, and for nothing else: a thread of each rank writes, hashes
and syncs. There is one checkpoint in the making at most; the next waits for it.
"""

import json
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from trainer.checkpoint import check_room, copy_to_host, shapes_of
from trainer.checkpoint_files import FORMAT, checkpoints_folder, name_of, prune
from trainer.checkpoint_write import WriteHf, collect_notes, facts_of, publish, write_part
from trainer.config import RunConfig
from trainer.engine import NamedState
from trainer.saved_tensors import SavedPart, SavedTensors
from trainer.world import World

FAILURES_IN_A_ROW = 2  # of saves; then the run ends


class Saver:
    """One per job. What is said to be collective must be called by every rank."""

    def __init__(self, run: RunConfig, named: NamedState, world: World, saved_step: int) -> None:
        self.run, self.named, self.world = run, named, world
        self.saved_step = saved_step  # of the newest checkpoint, published or under way
        self.longest_seconds = 0.0  # that a save took from beginning to end
        self.failures: list[str] = []  # since the last success
        self._thread: Thread | None = None
        self._problem: str | None = None
        self._given_up = Event()
        self._host: dict[str, torch.Tensor] = {}  # used again for each save

    def begin(self, document: dict[str, Any], write_hf: WriteHf) -> list[str]:
        """Copy the state to host memory and start writing it. Collective.

        document: for state.json: a TrainState's JSON and what else is compared at resume. Returns what was
        wrong with the save before this one, or with this one; older checkpoints stay as they were.
        OSError when saves fail one after the other; ValueError when a weight is not finite.
        """
        problems = self.wait()
        began = time.monotonic()
        final = checkpoints_folder(Path(self.run.dir)) / name_of(document["step"])
        temporary = final.with_name(
            self.world.broadcast(f".tmp-{final.name}-{uuid.uuid4().hex[:8]}")
        )
        refused = check_room(temporary, self.named, self.world, keep=self._is_kept)
        if refused:
            self._failed(refused)
            return [*problems, refused]
        copy_to_host(self.named, self.world, self._host)
        document = {"format": FORMAT, "optimizer_step": self.named.optimizer_step, **document}
        self.saved_step = document["step"]
        self._problem, self._given_up = None, Event()
        self._thread = Thread(
            target=self._write,
            args=(temporary, final, document, write_hf, began),
            name="checkpoint",
        )
        self._thread.start()
        return problems

    def has_problem(self) -> bool:
        """Whether this rank's part of the save under way has failed. Local, and at once."""
        return self._problem is not None

    def wait(self) -> list[str]:
        """Until the save under way is published, or has failed: why. Collective. OSError as in `begin`."""
        if self._thread is None:
            return []
        if not self.world.is_main:
            self._thread.join()
        problems = [p for p in self.world.gather(self._problem) if p]
        if problems:
            self._given_up.set()  # rank 0 waits for notes that will not come
        self._thread.join()
        self._thread = None
        problems = problems or [p for p in self.world.gather(self._problem) if p]
        self._problem = None
        if not problems:
            self.failures.clear()
            return []
        self._failed("; ".join(dict.fromkeys(problems)))
        return problems

    def _failed(self, problem: str) -> None:
        self.saved_step = -1
        self.failures.append(problem)
        if len(self.failures) >= FAILURES_IN_A_ROW:
            raise OSError("no checkpoint could be written: " + "; then: ".join(self.failures))

    def _is_kept(self, step: int) -> bool:
        return bool(self.run.keep_every) and step % self.run.keep_every == 0

    def _write(
        self,
        temporary: Path,
        final: Path,
        document: dict[str, Any],
        write_hf: WriteHf,
        began: float,
    ) -> None:
        rank, size = self.world.rank, self.world.size
        try:
            write_part(temporary, rank, size, self._host)
            if self.world.is_main:
                self._finish(temporary, final, document, write_hf)
        except Exception as error:  # of any kind: the run is told, and decides
            self._problem = f"rank {rank}: {error}"
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
        self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)

    def _finish(
        self, temporary: Path, final: Path, document: dict[str, Any], write_hf: WriteHf
    ) -> None:
        """Of rank 0: everything that is written once."""
        state, hf = temporary / "state.json", temporary / "hf"
        state.write_text(json.dumps(document), encoding="utf-8")
        files = collect_notes(temporary, self.world.size, self._given_up)
        with SavedTensors(temporary) as saved:
            weights: Mapping[str, torch.Tensor] = SavedPart(saved, "master", shapes_of(self.named))
            write_hf(weights, hf)
        written = [state, *sorted(path for path in hf.rglob("*") if path.is_file())]
        publish(temporary, final, files | facts_of(temporary, written))
        prune(Path(self.run.dir), self.run.keep_checkpoints, self._is_kept)
        print(f"saved {final}", flush=True)
