"""The entry point of every training process, whoever starts it.

torchrun --nproc-per-node 2 -m launcher.train PRESET [key=value ...]
deepspeed --num_gpus 2 --module launcher.train PRESET [key=value ...]
cloze train PRESET [key=value ...] [--processes 2]
"""

import argparse
import ctypes
import faulthandler
import os
import signal
import sys
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from trainer.activity import Activity
from trainer.exit_status import BUG, DONE, PREEMPTED, exit_status_of
from trainer.stopping import StopRequest
from trainer.watchdog import PR_SET_PDEATHSIG, STATUS_FILE, watch


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", type=Path, help="YAML file, e.g. configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. optim.learning_rate=1e-4")
    parser.add_argument(
        "--new-phase",
        action="store_true",
        help="go on from the checkpoint with other settings of the data, or another dataset",
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # deepspeed's launcher adds it


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="launcher.train", description="Train, or continue, the run of a preset."
    )
    add_train_arguments(parser)
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    return train_here(options.preset, options.overrides, new_phase=options.new_phase)


def train_here(preset: Path, overrides: list[str], *, new_phase: bool = False) -> int:
    """Train in this process, as the rank its environment says. Returns the exit status."""
    faulthandler.enable()  # a process that crashes in native code tells where
    activity, stop = Activity(), StopRequest()
    stop.listen()  # a stop that comes before the first step is remembered too
    die_with_launcher()
    tell_supervisor(f"pid {os.getpid()}")
    try:
        from trainer.config import load_config  # takes a while: after the signals

        config = load_config(preset, overrides)
        with ExitStack() as stack:
            watch(stack, activity, Path(config.dir), config.hang_timeout_seconds)
            _settle_deepspeed()
            # takes seconds: not before the preset is known to be right
            from trainer.engine import start_world, stop_world
            from trainer.loop import train
            from trainer.world import collective_timeout

            with stop.leaving_at_once(leave):
                world = start_world(collective_timeout(config.hang_timeout_seconds))
            status = train(config, world, activity, stop, new_phase=new_phase)
            stop_world()
    except Exception as error:
        return report(error)
    return PREEMPTED if status == "preempted" else DONE


def die_with_launcher() -> None:
    """Have a SIGTERM sent to this process when the launcher that started it is gone: it saves, and leaves."""
    if "RANK" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def leave(status: int) -> NoReturn:
    """End this process at once, all its output written.

    At the usual end of an interpreter, threads of torch and gloo that outlive it have now and then aborted
    a process whose work was done and saved.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    tell_supervisor(str(status))
    os._exit(status)


def tell_supervisor(word: str) -> None:
    """Our pid, then our exit status: torchrun makes 1 of every status but 0."""
    if folder := os.environ.get(STATUS_FILE):
        Path(f"{folder}-{os.environ.get('RANK', '0')}").write_text(word, encoding="ascii")


def _settle_deepspeed() -> None:
    """Tell DeepSpeed what it would guess, with a warning per process; and hush torch's about its calls."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def report(error: Exception) -> int:
    """Say what went wrong, once: rank 0 alone where all ranks say the same, else whom it befell."""
    rank = os.environ.get("RANK", "0")
    status = exit_status_of(error)
    if status == BUG or os.environ.get("CLOZE_TRACEBACK"):
        traceback.print_exc()
    if rank == "0" or not getattr(error, "is_of_all_ranks", False):
        said = f"{type(error).__name__}: {error}" if status == BUG else str(error)
        print(
            f"cloze: {'' if rank == '0' else f'rank {rank}: '}{said}", file=sys.stderr, flush=True
        )
    return status


if __name__ == "__main__":
    leave(main())
