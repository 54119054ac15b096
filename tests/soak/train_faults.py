"""Minutes in, a table out: a training run under random faults, and whether it ends as the undisturbed one does.

    python tests/soak/train_faults.py --minutes 120 --folder /scratch/soak [--seconds-between-faults 20]

A run with faults in a Poisson process, started again whenever it ends with `cloze train --processes 2`, for
that many minutes; then the undisturbed run of as many steps. What happens to the first, at random:

    kill rank, kill launcher, kill all     SIGKILL of one training process; of `cloze train`; of everything
    stop rank                              SIGSTOP: a rank that hangs
    ask to stop                            SIGTERM or SIGUSR1 to `cloze train`: must save and end with 75
    full disk                              the run's folder (a small file system) has no room for a while
    damaged checkpoint                     a bit of the newest checkpoint flips between two starts
    damaged block                          a bit of a shard flips; it is put right after the run has refused it

At the end: every step once and in order, losses, gradient norms and digests of rows equal bit for bit, the last
checkpoint's weights equal byte for byte, no process left, and the account of time.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import environment, read_metrics, tiny_preset, write_corpus  # noqa: E402

from data.prepare import PrepareConfig, prepare  # noqa: E402
from launcher.supervise import descendants  # noqa: E402
from trainer.checkpoint_files import list_checkpoints, problems_of, step_of  # noqa: E402

FAULTS = (
    "kill rank", "kill launcher", "kill all", "stop rank", "ask to stop", "full disk",
    "damaged checkpoint", "damaged block",
)  # fmt: skip
ENDLESS = 10_000_000  # steps: the faults end by the clock
SAVE_EVERY = 20
HANG_SECONDS = 10
DISK = "size=256m"
EXACT = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "rows_digest")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds-between-faults", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--go-on", action="store_true", help="with the disturbed run of an earlier call"
    )
    options = parser.parse_args()
    dataset = make_dataset(options.folder)
    broken = options.folder / "broken"
    if options.go_on:
        preset = broken / "preset.yaml"
    else:
        preset = make_preset(broken, dataset, ENDLESS)
        subprocess.run(["mount", "-t", "tmpfs", "-o", DISK, "tmpfs", broken / "run"], check=True)
    try:
        soak = Soak(preset, broken, dataset, options)
        soak.go()
        whole = options.folder / "whole"
        steps = step_of(list_checkpoints(broken / "run")[-1])
        began = time.monotonic()
        assert start(make_preset(whole, dataset, steps), whole / "log").wait() == 0
        print(f"undisturbed: {steps} steps in {time.monotonic() - began:.0f} s", flush=True)
        soak.report(whole / "run")
    finally:
        subprocess.run(["umount", broken / "run"], check=False)


def make_preset(folder: Path, dataset: Path, steps: int) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "run").mkdir(parents=True)
    optim = {"warmup_steps": 20, "schedule": "constant"}
    return tiny_preset(
        folder, dataset, steps=steps, save_every=SAVE_EVERY, hang_timeout_seconds=HANG_SECONDS,
        precision="bf16", optim=optim,
    )  # fmt: skip


def make_dataset(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "dataset").exists():
        text = write_corpus(folder / "text.jsonl", 3000)
        prepare(
            PrepareConfig(
                output=str(folder / "dataset"), sources={"text": (str(text),)}, vocab_size=360,
                heldout_fraction=0.05, block_tokens=4096, num_processes=2,
            )
        )  # fmt: skip
    return folder / "dataset"


def start(preset: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "launcher.cli", "train", str(preset), "--processes", "2"]
    with log.open("ab") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True
        )


def ranks_of(launcher: int) -> list[int]:
    """Pids of the training processes that a `cloze train` has started."""
    found = []
    for pid in descendants(launcher):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"launcher.train" in command and b"torch.distributed.run" not in command:
            found.append(pid)
    return sorted(found)


class Soak:
    def __init__(
        self, preset: Path, folder: Path, dataset: Path, options: argparse.Namespace
    ) -> None:
        self.preset, self.run, self.log = preset, folder / "run", folder / "log"
        self.shard = next(dataset.glob("*/train/*.tar"))
        self.rng = random.Random(options.seed)
        self.seconds, self.mean_seconds = 60 * options.minutes, options.seconds_between_faults
        self.done: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.repair: list[tuple[Path, bytes]] = []
        self.process = start(preset, self.log)

    def go(self) -> None:
        """Faults until the time is over, then a planned stop."""
        self.began = time.monotonic()
        while time.monotonic() < self.began + self.seconds:
            due = time.monotonic() + self.rng.expovariate(1 / self.mean_seconds)
            while time.monotonic() < due and self.process.poll() is None:
                time.sleep(0.05)
            if self.process.poll() is None:
                fault = self.rng.choice(FAULTS)
                if self.inflict(fault):
                    self.done[fault] += 1
                    print(f"{time.monotonic() - self.began:7.0f} s  {fault}", flush=True)
            if self.process.poll() is not None:
                self.start_again()
        while self.stop() != 75:
            self.start_again()
        self.wait_for_silence()

    def start_again(self) -> None:
        self.statuses[self.process.returncode] += 1
        self.mend()
        self.process = start(self.preset, self.log)

    def stop(self) -> int:
        """Asked once it has had time to begin; the status it ends with."""
        for _ in range(60):
            if self.process.poll() is None:
                time.sleep(1)
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()

    def inflict(self, fault: str) -> bool:
        """Whether it could be."""
        ranks = ranks_of(self.process.pid)
        if fault in ("kill rank", "stop rank"):
            if not ranks:
                return False
            number = signal.SIGKILL if fault == "kill rank" else signal.SIGSTOP
            os.kill(self.rng.choice(ranks), number)
        elif fault == "kill launcher":
            self.process.kill()
            self.process.wait()
            self.wait_for_silence()
        elif fault == "kill all":
            self.kill_all()
        elif fault == "ask to stop":
            self.process.send_signal(self.rng.choice([signal.SIGTERM, signal.SIGUSR1]))
            self.process.wait(timeout=120)
        elif fault == "full disk":
            self.fill_disk()
        elif fault == "damaged checkpoint":
            return self.damage_checkpoint()
        else:
            return self.damage_block()
        return True

    def kill_all(self) -> None:
        family = {self.process.pid, *descendants(self.process.pid)}
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        self.wait_for_silence()

    def wait_for_silence(self) -> None:
        """No process of the run is left: within 30 seconds, or the soak has failed."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if not self.left():
                return
            time.sleep(0.1)
        raise SystemExit(f"FAILED: processes are left: {self.left()}")

    def left(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(self.preset).encode() in command.split(b"\0"):
                found.append(int(entry.name))
        return found

    def fill_disk(self) -> None:
        filler = self.run / "filler.tmp-"
        self.repair.append((filler, b""))
        free = shutil.disk_usage(self.run).free
        with suppress(OSError):  # the run takes space too meanwhile
            filler.write_bytes(b"x" * max(0, free - 200_000))
        time.sleep(self.rng.uniform(1, 8))
        self.mend()

    def damage_checkpoint(self) -> bool:
        """Of the newest, and only where another is there to fall back to; while nothing runs."""
        self.kill_all()
        found = list_checkpoints(self.run)
        if len(found) < 2:
            return False
        paths = sorted(path for path in found[-1].rglob("*") if path.is_file())
        self.flip(self.rng.choice(paths))
        return True

    def damage_block(self) -> bool:
        self.kill_all()
        self.repair.append((self.shard, self.shard.read_bytes()))
        content = bytearray(self.shard.read_bytes())
        for place in range(600, len(content) - 1024, 700):
            content[place] ^= 1
        self.shard.write_bytes(content)
        return True

    def flip(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        path.write_bytes(content)

    def mend(self) -> None:
        for path, content in self.repair:
            if content:
                path.write_bytes(content)
            else:
                path.unlink(missing_ok=True)
        self.repair.clear()

    def report(self, whole: Path) -> None:
        curves = [
            [tuple(m[name] for name in EXACT) for m in read_metrics(r)] for r in (whole, self.run)
        ]
        first = next((i for i, (a, b) in enumerate(zip(*curves, strict=False)) if a != b), None)
        ends = [list_checkpoints(r)[-1] for r in (whole, self.run)]
        weights = [(end / "hf" / "model.safetensors").read_bytes() for end in ends]
        sound = all(problems_of(checkpoint) == [] for checkpoint in list_checkpoints(self.run))
        jobs = (self.run / "jobs.jsonl").read_text(encoding="utf-8").splitlines()
        starts = sum('"kind": "start"' in line for line in jobs)
        print(f"with faults: {len(curves[1])} steps in {self.seconds:.0f} s, {starts} jobs")
        print("faults:", self.done.total(), json.dumps(dict(sorted(self.done.items()))))
        print("statuses of `cloze train`:", json.dumps(dict(sorted(self.statuses.items()))))
        print(f"curves equal: {curves[0] == curves[1]} (first difference: {first})")
        print(f"weights equal: {weights[0] == weights[1]}; checkpoints sound: {sound}")
        print(subprocess.run(
            [sys.executable, "-m", "launcher.cli", "status", str(self.run)],
            cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
        ).stdout)  # fmt: skip
        ok = curves[0] == curves[1] and weights[0] == weights[1] and sound
        sys.exit(0 if ok else "FAILED")


if __name__ == "__main__":
    main()
