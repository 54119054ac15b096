"""launcher.train with faults: `python tests/faulty_train.py PRESET ...`, as FAULT_PLAN in the environment says.

FAULT_PLAN is a JSON list of {"rank", "step", "at", "do", ...}: when that rank is about to do `at` (an activity
of trainer.activity; "join": the other processes) in the step after `step` completed ones, it does `do`, for
`times` steps; "once" names a file that is made then, and keeps it from happening again, "after" one that must
be there. The program itself has no hooks: what is patched here is its own functions.

do: kill, kill loader (the rank's loader processes), stop (SIGSTOP), exit0, segv, raise, sleep (seconds), hold
(until something matches the glob `until`, or the process has been asked to stop), term, usr1, nan (the loss),
spike (the loss times 1e4), gil (the interpreter stuck), oom (takes all memory of the control group `cgroup`).
Other variables: FULL_DISK and FULL_DISK_STEP, BROKEN_DISK_STEP, FLIP_STEP, NAN_STEP, CLOCK_SKEW (seconds that
time.time is wrong by), JOIN_SECONDS (of waiting for the other processes). SHUFFLED_LABELS: every task's labels
are dealt out anew within each micro-batch. UNPROTECTED names a protection to switch off.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from glob import glob
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(ROOT / "tests"))]

from launcher.train import leave, main  # noqa: E402
from trainer.activity import Activity  # noqa: E402
from trainer.stopping import StopRequest  # noqa: E402

RANK = int(os.environ.get("RANK", "0"))
PLAN: list[dict[str, Any]] = [
    fault
    for fault in json.loads(os.environ.get("FAULT_PLAN", "[]"))
    if fault["rank"] in (RANK, "all")
]
SIGNALS = {
    "kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr1": signal.SIGUSR1,
    "int": signal.SIGINT,
}  # fmt: skip
WAYS_TO_END = {"exit0": lambda: os._exit(0), "segv": lambda: ctypes.string_at(0)}


def is_due(fault: dict[str, Any], step: int) -> bool:
    once = Path(fault["once"]) if "once" in fault else None  # a file: not again after a restart
    due = fault["step"] <= step < fault["step"] + fault.get("times", 1)
    due = due and ("after" not in fault or Path(fault["after"]).exists())
    if due and once:
        if once.exists():
            return False
        once.touch()
    return due


def act(fault: dict[str, Any]) -> None:
    if fault["do"] in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault["do"]])
    elif fault["do"] in WAYS_TO_END:
        WAYS_TO_END[fault["do"]]()
    elif fault["do"] == "raise":
        raise RuntimeError("a planned fault")
    elif fault["do"] == "sleep":
        time.sleep(fault["seconds"])
    elif fault["do"] == "hold":
        hold(fault.get("until", ""))
    elif fault["do"] == "kill loader":
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGKILL)
    elif fault["do"] == "oom":
        Path(fault["cgroup"], "cgroup.procs").write_text(str(os.getpid()))
        _ = [bytearray(os.urandom(1 << 20)) for _ in range(1 << 12)]
    elif fault["do"] == "gil":
        lock_twice()


def hold(until: str) -> None:
    while not (asked_to_stop or glob(until)):
        time.sleep(0.01)


def lock_twice() -> None:
    """Wait for ever in C with the interpreter's lock held; unlike a sleep, no signal ends this."""
    libc = ctypes.PyDLL(None)
    mutex = ctypes.create_string_buffer(256)  # zeros: PTHREAD_MUTEX_INITIALIZER
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


asked_to_stop: list[int] = []  # signals
note = StopRequest._note


def watched_note(self: StopRequest, number: int, frame: Any) -> None:
    asked_to_stop.append(number)
    note(self, number, frame)


enter = Activity.enter


def faulty_enter(self: Activity, name: Any) -> None:
    enter(self, name)
    for fault in PLAN:
        if fault["at"] == name and fault["do"] not in ("nan", "spike") and is_due(fault, self.step):
            act(fault)


def patch_join() -> None:
    import trainer.engine as engine

    start_world = engine.start_world

    def faulty_start(*rest: Any) -> Any:
        for fault in PLAN:
            if fault["at"] == "join" and is_due(fault, 0):
                act(fault)
        return start_world(*rest)

    engine.start_world = faulty_start


def patch_losses() -> None:
    import trainer.loop as loop

    optimizer_step, objective, now = loop.optimizer_step, loop.objective, {"step": 0}

    def watched(run: Any, job: Any, state: Any, *rest: Any) -> float:
        now["step"] = state.step
        return optimizer_step(run, job, state, *rest)

    def scaled(losses: Any, *rest: Any) -> Any:
        factor = 1.0
        for fault in PLAN:
            if fault["do"] in ("nan", "spike") and is_due(fault, now["step"]):
                factor = float("nan") if fault["do"] == "nan" else 1e4
        losses["mlm"].loss_sum.mul_(factor)  # in place: what is logged sees it too
        return objective(losses, *rest)

    loop.optimizer_step, loop.objective = watched, scaled


def fill_disk(rank: int, step: int) -> None:
    """Writing of that rank's part fails at that step's checkpoint."""
    import trainer.saver as saver

    write_part = saver.write_part

    def failing(folder: Path, *rest: Any) -> None:
        if rank == RANK and f"{step:08d}" in folder.name:
            raise OSError(28, "No space left on device", str(folder))
        write_part(folder, *rest)

    saver.write_part = failing


def break_disk(step: int) -> None:
    """Of rank 1's files for that step's checkpoint none can be forced to disk."""
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if RANK == 1 and f"step-{step:08d}" in path:
            raise OSError(5, "Input/output error", path)
        fsync(descriptor)

    os.fsync = failing


def set_clock_wrong(seconds: float) -> None:
    now = time.time
    time.time = lambda: now() + seconds


def wait_less_for_others(seconds: float) -> None:
    from datetime import timedelta

    import trainer.world as world

    world.LEAST_COLLECTIVE_TIMEOUT = timedelta(seconds=seconds)


def flip_a_weight(step: int) -> None:
    """One bit of a weight that rank 1 computes with."""
    import torch

    import trainer.loop as loop

    optimizer_step = loop.optimizer_step

    def flipped(run: Any, job: Any, state: Any, *rest: Any) -> float:
        norm = optimizer_step(run, job, state, *rest)
        if RANK == 1 and state.step == step:
            weight = next(iter(job.named.parameters.values())).data.view(-1)
            weight[:1].view(torch.int32).bitwise_xor_(1)
        return norm

    loop.optimizer_step = flipped


def poison_a_weight(step: int) -> None:
    """One master weight that rank 1 owns becomes NaN after that step."""
    import trainer.loop as loop
    from trainer.fragments import local_fragments

    between_steps = loop.between_steps

    def poisoned(run: Any, job: Any, state: Any, *rest: Any) -> None:
        if RANK == 1 and state.step == step:
            next(iter(local_fragments(job.named))).values[0] = float("nan")
        between_steps(run, job, state, *rest)

    loop.between_steps = poisoned


def shuffle_labels() -> None:
    """As many of each kind, at slots that have nothing to do with them."""
    import torch

    from data.collate import Batch

    model_inputs = Batch.model_inputs

    def shuffled(self: Batch, device: torch.device) -> dict[str, Any]:
        inputs = model_inputs(self, device)
        inputs["targets"] = {
            task: (slots, labels[torch.randperm(len(labels))])
            for task, (slots, labels) in inputs["targets"].items()
        }
        return inputs

    Batch.model_inputs = shuffled  # type: ignore[method-assign]


def unprotect(name: str) -> None:
    """Without it, the test of it must fail."""
    if name == "room":  # what is free is not looked at
        import trainer.checkpoint as checkpoint

        checkpoint.free_bytes = lambda folder: 1 << 60


Activity.enter = faulty_enter  # type: ignore[method-assign]
StopRequest._note = watched_note  # type: ignore[method-assign]
if any(fault["do"] in ("nan", "spike") for fault in PLAN):
    patch_losses()
if any(fault["at"] == "join" for fault in PLAN):
    patch_join()
if "FULL_DISK" in os.environ:
    fill_disk(int(os.environ["FULL_DISK"]), int(os.environ["FULL_DISK_STEP"]))
if "BROKEN_DISK_STEP" in os.environ:
    break_disk(int(os.environ["BROKEN_DISK_STEP"]))
if "CLOCK_SKEW" in os.environ:
    set_clock_wrong(float(os.environ["CLOCK_SKEW"]))
if "JOIN_SECONDS" in os.environ:
    wait_less_for_others(float(os.environ["JOIN_SECONDS"]))
if "FLIP_STEP" in os.environ:
    flip_a_weight(int(os.environ["FLIP_STEP"]))
if "NAN_STEP" in os.environ:
    poison_a_weight(int(os.environ["NAN_STEP"]))
if "SHUFFLED_LABELS" in os.environ:
    shuffle_labels()
if "UNPROTECTED" in os.environ:
    unprotect(os.environ["UNPROTECTED"])
if __name__ == "__main__":
    leave(main())
