"""A process beside each rank that reads its heartbeat and explains a hang: who, in what, since when.

A rank that waits for another in a collective looks exactly like one that hangs. So a rank whose activity
has not changed for half the timeout leaves a note in the run's folder; when the time is over the notes are
compared, and the rank that is furthest behind is named. In a healthy run nothing is ever written. Before the
ranks have found each other, each is watched for itself.

python -m trainer.watchdog: started by `watch`, ends with its rank. Imports the standard library alone.
"""

import argparse
import ctypes
import faulthandler
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trainer.activity import HEARTBEAT, NAMES, Activity, read_heartbeat
from trainer.exit_status import HUNG

LONG_ACTIVITIES = {"startup", "save", "rewind", "eval"}  # may take several times longer than a step
PATIENCE = 10  # with those, and with steps: so many times the longest step so far
LOOK_SECONDS = 0.5
SUSPENDED_SECONDS = (
    5.0  # later than that with a look: the job as a whole was suspended (scontrol suspend)
)
NOTES_SECONDS = 2.0  # the other ranks' notes are waited for
STALLS = "stalls"
SAID = "said"  # a file beside the notes: the hang is explained, and in the ledger
PR_SET_PDEATHSIG = 1  # linux/prctl.h
STATUS_FILE = "CLOZE_STATUS_FILE"  # environment: where each rank leaves its exit status


def watch(stack: ExitStack, activity: Activity, run_dir: Path, timeout_seconds: float) -> None:
    """Start this process's watchdog; it is stopped with `stack`."""
    faulthandler.register(signal.SIGQUIT, all_threads=True)  # in C: works while Python is stuck
    rank, world_size = (
        os.environ.get(name, one) for name, one in (("RANK", "0"), ("WORLD_SIZE", "1"))
    )
    command = [
        sys.executable, "-m", "trainer.watchdog", str(run_dir), f"--rank={rank}",
        f"--world-size={world_size}", f"--timeout={timeout_seconds}", f"--pid={os.getpid()}",
        f"--heartbeat={activity.descriptor}",
    ]  # fmt: skip
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        command,
        pass_fds=[activity.descriptor],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,  # a signal to the rank's group is not for it
    )
    stack.callback(process.wait)
    stack.callback(process.kill)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    for name in ("rank", "world-size", "pid", "heartbeat"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--timeout", type=float)
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    memory = mmap.mmap(options.heartbeat, HEARTBEAT.size, prot=mmap.PROT_READ)
    noted: dict[str, Any] | None = None
    looked = resumed = time.monotonic()
    while os.getppid() == options.pid:
        time.sleep(LOOK_SECONDS)
        now = time.monotonic()
        if now - looked > LOOK_SECONDS + SUSPENDED_SECONDS:
            resumed = now
        looked = now
        noted = look(options, memory, noted, resumed)


def look(
    options: argparse.Namespace, memory: mmap.mmap, noted: dict[str, Any] | None, resumed: float
) -> dict[str, Any] | None:
    """Note, or give up, a rank that stands still. noted: what was noted before; returns what is now.

    resumed: when the job was last resumed; time before that does not count.
    """
    beat = read_heartbeat(memory)
    folder = options.run_dir / STALLS / beat.job if beat.job else None
    stalled = time.monotonic() - max(beat.since, resumed)
    limit = allowed_seconds(beat.activity, beat.longest_step_seconds, options.timeout)
    if stalled > options.timeout and process_state(options.pid) == "T":
        limit = options.timeout  # whatever it was doing
    if stalled < limit / 2:
        if noted is not None and folder:
            (folder / _name(options.rank)).unlink(missing_ok=True)
        return None
    if noted is None or stalled > limit:
        noted = {
            "rank": options.rank, "host": socket.gethostname(), "pid": options.pid,
            "step": beat.step, "activity": beat.activity, "seconds": round(stalled, 1),
            "process_state": process_state(options.pid),
        }  # fmt: skip
        if folder:
            _leave_note(folder, noted)
    if stalled > limit:
        time.sleep(NOTES_SECONDS)
        if read_heartbeat(memory) == beat:
            give_up(options, folder, noted)
    return noted


def allowed_seconds(activity: str, longest_step_seconds: float, timeout: float) -> float:
    """How long an activity may last before it is taken for hung."""
    return max(
        timeout * (PATIENCE if activity in LONG_ACTIVITIES else 1), PATIENCE * longest_step_seconds
    )


def process_state(pid: int) -> str:
    """The kernel's letter: R running, S waiting, D in the kernel (a disk?), T stopped by a signal."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "gone"
    return stat.rpartition(")")[2].split()[0]


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _leave_note(folder: Path, note: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _name(note["rank"])
    path.with_suffix(".tmp").write_text(json.dumps(note), encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def give_up(options: argparse.Namespace, folder: Path | None, noted: dict[str, Any]) -> None:
    """Show where the rank is, explain, and end it; its launcher then ends the others.

    folder: of all ranks' notes, once there is one. noted: this rank's own.
    """
    notes = read_notes(folder) if folder else [noted]
    said = explain(notes, options.world_size)
    speaks = folder is None or _is_first(folder / f"{SAID}-{socket.gethostname()}")
    if folder and _is_first(folder / SAID):
        line = {
            "kind": "end", "job": folder.name, "time": time.time(), "status": "hung",
            "step": max(note["step"] for note in notes), "exit_status": HUNG, "message": said,
        }  # fmt: skip
        with (options.run_dir / "jobs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    # At once: when another rank's watchdog is quicker, the launcher ends this rank, and this process with it.
    if speaks:
        print(f"cloze: {said}", file=sys.stderr, flush=True)
    os.kill(options.pid, signal.SIGQUIT)  # prints the stack of every thread
    time.sleep(2 * LOOK_SECONDS)  # in which the other ranks do the same
    if status_file := os.environ.get(STATUS_FILE):
        Path(f"{status_file}-{options.rank}").write_text(str(HUNG), encoding="ascii")
    os.kill(options.pid, signal.SIGKILL)


def _is_first(path: Path) -> bool:
    """Whether nobody has made this file before."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    return True


def is_explained(run_dir: Path, job: str) -> bool:
    """Whether a watchdog has said that this job hangs: what befalls a rank afterwards follows from that."""
    return (run_dir / STALLS / job / SAID).exists()


def read_notes(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank-*.json"))
    ]


def explain(notes: list[dict[str, Any]], world_size: int) -> str:
    """What a person needs: the rank that the others wait for, what it is doing, and on which machine."""
    absent = sorted(set(range(world_size)) - {note["rank"] for note in notes})
    stopped = [note for note in notes if note["process_state"] in ("T", "t")]
    behind = min(_place(note) for note in notes)
    late = [note for note in notes if _place(note) == behind]
    if stopped:
        guilty, why = stopped, "its process was stopped by a signal"
    elif len(late) < len(notes):
        guilty, why = late, "the others wait for it"
    elif len(notes) == 1 < world_size:
        guilty, why = notes, "no other rank has left word that it waits"
    else:
        guilty, why = notes, "all ranks are at the same place: the network, or a shared disk?"
    lines = [f"the run hangs: {', '.join(map(_describe, guilty))}; {why}"]
    lines += [f"  {_describe(note)}" for note in notes if note not in guilty]
    if absent:
        lines.append(
            f"  rank {', '.join(map(str, absent))}: no word; its machine is gone, or it is not waiting"
        )
    lines.append(
        "  The stacks are printed below. The same command goes on from the last checkpoint; "
        "hang_timeout_seconds is how long to wait."
    )
    return "\n".join(lines)


def _place(note: dict[str, Any]) -> tuple[int, int]:
    return note["step"], NAMES.index(note["activity"])


def _describe(note: dict[str, Any]) -> str:
    return (
        f"rank {note['rank']} ({note['host']}, pid {note['pid']}) in {note['activity']!r} of step "
        f"{note['step'] + 1} for {note['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
