"""`cloze train PRESET`: a run, or its continuation, by as many processes as this machine has GPUs."""

import argparse
import os
from pathlib import Path

from launcher.supervise import supervise
from launcher.train import add_train_arguments, leave, train_here
from trainer.config import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_train_arguments(parser)
    parser.add_argument(
        "--processes", type=int, help="on this machine; default: one per GPU, or one"
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        help="starts in a row that may fail without a new checkpoint (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Train until the run is done, or cannot go on. Returns the exit status; ValueError for bad options."""
    if options.processes is not None and options.processes < 1:
        raise ValueError(f"--processes {options.processes} is below 1")
    if options.restarts < 0:
        raise ValueError(f"--restarts {options.restarts} is negative")
    if "RANK" in os.environ:  # started by torchrun, deepspeed or srun already
        leave(train_here(options.preset, options.overrides, new_phase=options.new_phase))
    run_dir = Path(load_config(options.preset, options.overrides).dir)
    new_phase = ["--new-phase"] if options.new_phase else []
    arguments = [*new_phase, str(options.preset), *options.overrides]
    return supervise(arguments, options.processes or _num_gpus() or 1, run_dir, options.restarts)


def _num_gpus() -> int:
    import torch  # seconds: not where the number is given

    return torch.cuda.device_count()
