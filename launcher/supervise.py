"""Training processes in, kept alive until the run is done: what `cloze train` does around them.

torchrun tells neither why its processes ended (it makes 1 of every status), nor ends them all when it
is killed itself. So every rank leaves its pid, then its exit status, in a file of its own; what is left of a
failed start is ended, and a start that reached no new checkpoint counts as one without progress.
"""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from trainer.checkpoint_files import list_checkpoints, step_of
from trainer.exit_status import (
    BUG,
    CONFIG,
    DIVERGED,
    DONE,
    HUNG,
    NOT_TO_REPEAT,
    PREEMPTED,
    STORAGE,
    UNAVAILABLE,
)  # fmt: skip
from trainer.stopping import PLANNED
from trainer.watchdog import PR_SET_PDEATHSIG, STATUS_FILE

WORST_FIRST = (DIVERGED, CONFIG, STORAGE, HUNG, BUG, UNAVAILABLE, PREEMPTED)
LOOK_SECONDS = 0.2
ALONE_SECONDS = 15.0  # for the other ranks to notice that one is gone; then they are ended
SHUTDOWN_SECONDS = 3600  # torchrun waits so long for ranks that save after a signal


def launch_command(arguments: list[str], processes: int) -> list[str]:
    """One training process, or `processes` of them under torchrun."""
    module = ["-m", "launcher.train", *arguments]
    if processes == 1:
        return [sys.executable, *module]
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "--max-restarts=0", f"--shutdown-timeout={SHUTDOWN_SECONDS}",
        "--signals-to-handle=" + ",".join(number.name for number in PLANNED), *module,
    ]  # fmt: skip


def supervise(arguments: list[str], processes: int, run_dir: Path, restarts: int) -> int:
    """Train until the run is done, is to stop, or cannot go on. Returns the exit status.

    restarts: how often in a row it is started again without having reached a new checkpoint.
    """
    in_vain = 0
    with tempfile.TemporaryDirectory(prefix="cloze-status-") as folder:
        while True:
            before = _newest_step(run_dir)
            num_oom_kills = _num_oom_kills()
            start = Start(launch_command(arguments, processes), Path(folder), processes)
            status = start.wait()
            if start.killed_ranks and _num_oom_kills() > num_oom_kills:
                _say(
                    "the kernel has killed a process because memory ran out (ranks that left without a word: "
                    f"{', '.join(map(str, start.killed_ranks))}): give the job more memory, a smaller "
                    "micro_batch_size, or fewer processes on this machine"
                )
            in_vain = 0 if _newest_step(run_dir) > before else in_vain + 1
            if status in NOT_TO_REPEAT or start.asked_to_stop:
                return status
            if in_vain > restarts:
                if restarts:
                    _say(f"no new checkpoint in {in_vain} starts: giving up (status {status})")
                return status
            _say(f"ended with status {status}; starting again")


def _say(message: str) -> None:
    print(f"cloze: {message}", file=sys.stderr, flush=True)


def _num_oom_kills() -> int:
    """Processes that this machine's kernel has killed for want of memory since it was started."""
    words = _read(Path("/proc/vmstat")).split()
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


def _newest_step(run_dir: Path) -> int:
    return max(map(step_of, list_checkpoints(run_dir)), default=-1)


class Start:
    """One start of all processes of a job on this machine."""

    def __init__(self, command: list[str], folder: Path, processes: int) -> None:
        self.asked_to_stop = False
        self.killed_ranks: list[int] = []  # that left without a word, of those that had begun
        self._files = [folder / f"rank-{rank}" for rank in range(processes)]
        for file in self._files:
            file.unlink(missing_ok=True)
        self._signalled_at: dict[int, float] = {}
        for number in PLANNED:
            signal.signal(number, self._pass_on)
        self._process = subprocess.Popen(
            command,
            env={**os.environ, STATUS_FILE: str(folder / "rank")},
            start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on
            preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )

    def wait(self) -> int:
        """Until all processes have ended; nothing of them is left then."""
        alone_since = None
        family: set[int] = set()
        while self._process.poll() is None:
            time.sleep(LOOK_SECONDS)
            family = descendants(self._process.pid) | {pid for pid in family if _is_alive(pid)}
            if not self._a_rank_is_gone():
                alone_since = None
            elif alone_since is None:
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > ALONE_SECONDS:
                self._end({*family, self._process.pid})
        self._end(family)
        return self._status(self._process.returncode)

    def _status(self, returncode: int) -> int:
        words = list(map(_read, self._files))
        self.killed_ranks = [rank for rank, word in enumerate(words) if word.startswith("pid")]
        if self.asked_to_stop and returncode < 0 and not any(words):
            return PREEMPTED  # before any rank had begun: nothing was there to be saved
        return status_of(words, returncode, asked_to_stop=self.asked_to_stop)

    def _a_rank_is_gone(self) -> bool:
        words = [_read(file).split() for file in self._files]
        return any(w[0] == "pid" and not _is_alive(int(w[1])) for w in words if len(w) == 2)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.asked_to_stop = True
        first = self._signalled_at.setdefault(number, time.monotonic())
        if time.monotonic() - first > 1 and number in (signal.SIGINT, signal.SIGTERM):
            self._end({*descendants(self._process.pid), self._process.pid})
        elif self._process.poll() is None:
            self._process.send_signal(number)

    @staticmethod
    def _end(pids: set[int]) -> None:
        for pid in pids:
            if _is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def status_of(words: Sequence[str], returncode: int, *, asked_to_stop: bool) -> int:
    """The exit status of a start, from the last word of each rank: "pid N" where it left without another.

    returncode: of what started them, which makes 1 of all statuses but 0.
    """
    statuses = {int(word) for word in words if word.isdigit()}
    if returncode == 0 and statuses == {DONE} and all(word.isdigit() for word in words):
        return DONE
    if any(word.startswith("pid") for word in words) and not asked_to_stop:
        statuses.discard(PREEMPTED)  # torchrun asks the others to stop when one has died
    for status in WORST_FIRST:
        if status in statuses:
            return status
    return 128 - returncode if returncode < 0 else returncode or BUG


def descendants(pid: int) -> set[int]:
    """Children, theirs, and so on."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _read(entry / "stat")):
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found: set[int] = set()
    following = [pid]
    while following:
        new = children.get(following.pop(), [])
        found.update(new)
        following += new
    return found


def _is_alive(pid: int) -> bool:
    stat = _read(Path(f"/proc/{pid}/stat"))
    return bool(stat) and stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
