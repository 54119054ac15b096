"""`cloze probe RUN|MODEL LABELLED`: frozen checkpoints and labelled texts in, what can be read off them out.

Nothing is trained but a linear classifier on top, on CPUs, and nothing of the run is changed: its folder gets
probes.jsonl and TensorBoard scalars. What was probed before is not probed again.
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from data.files import read_small_json
from data.labelled import LabelledTask, read_tasks
from launcher.probe_file import ProbeFile
from launcher.probe_lines import read_probes
from launcher.probe_task import probe_task
from launcher.probe_text import probe_table
from launcher.status import read_status
from model.features import load_encoder
from trainer.checkpoint_files import list_checkpoints, read_state, step_of
from trainer.files import sha256_of

WEIGHTS = "hf/model.safetensors"
NICENESS = 19  # training beside it goes first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help="folder of a run, or a model in Hugging Face layout"
    )
    parser.add_argument(
        "labelled", type=Path, help="folder with a sub-folder of train and dev files a task"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--step", type=int, help="of a run: this checkpoint alone (default: all)")
    chosen.add_argument(
        "--newest", action="store_true", help="of a run: its newest checkpoint alone"
    )
    chosen.add_argument(
        "--watch", action="store_true", help="of a run: all, and new ones until it is finished"
    )
    parser.add_argument(
        "--columns", action="append", default=[], metavar="TASK=LABEL,TEXT[,TEXT]",
        help="names of a task's columns, or numbers from 1 where a .tsv has no header",
    )  # fmt: skip
    parser.add_argument(
        "--max-rows", type=int, default=10_000, help="of train, and of dev (default: %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="beside training more only wait (default: %(default)s)",
    )
    parser.add_argument(
        "--every",
        type=float,
        default=10.0,
        help="seconds between two looks of --watch (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """0, or 1 where a checkpoint is damaged. ValueError: what is given cannot be probed, or probed with."""
    least = {"max_rows": 10, "every": 0.01, "threads": 1}
    if wrong := [name for name, value in least.items() if getattr(options, name) < value]:
        raise ValueError(
            "; ".join(
                f"--{name.replace('_', '-')} {getattr(options, name)} is below {least[name]}"
                for name in wrong
            )
        )
    is_run = (options.source / "config.yaml").is_file()
    if not is_run and not (options.source / "config.json").is_file():
        raise ValueError(
            f"{options.source} is neither a run (config.yaml) nor a model (config.json)"
        )
    if not is_run and (options.step is not None or options.newest or options.watch):
        raise ValueError(
            f"--step, --newest and --watch are of a run, and {options.source} is a model"
        )
    tasks, left_out = read_tasks(options.labelled, _columns(options.columns), options.max_rows)
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    for task in tasks:
        print(_describe(task))
    os.nice(NICENESS)
    torch.set_num_threads(options.threads)
    if is_run:
        try:
            return probe_run(options, tasks)
        except KeyboardInterrupt:
            print("stopped; what is probed stays")
            return 130
    model = load_encoder(options.source)
    lines = [line for task in tasks for line in probe_task(model, options.source, task)]
    print(f"\n{probe_table(lines)}")
    return 0


def _columns(given: list[str]) -> dict[str, list[str]]:
    columns = {}
    for text in given:
        name, _, rest = text.partition("=")
        columns[name] = rest.split(",")
        if not name or len(columns[name]) not in (2, 3) or not all(columns[name]):
            raise ValueError(f"--columns {text}: give TASK=LABEL,TEXT or TASK=LABEL,TEXT,TEXT")
    return columns


def _describe(task: LabelledTask) -> str:
    label, *texts = task.columns
    left_out = (
        f"; {task.num_left_out} rows without an agreed label left out" if task.num_left_out else ""
    )
    return (
        f"{task.name}: {label} of {' + '.join(texts)}, {len(task.classes)} classes, {len(task.train.labels):,} "
        f"rows of train, {len(task.evaluation.labels):,} of {task.split}{left_out}"
    )


def probe_run(options: argparse.Namespace, tasks: list[LabelledTask]) -> int:
    """Probe what is asked for of a run's checkpoints, and say what was found; 1 where one is damaged."""
    run: Path = options.source
    chosen = _watched(run, options.every) if options.watch else _chosen(options)
    damaged: set[Path] = set()
    steps: set[int] = set()
    with ProbeFile(run) as file:
        for checkpoint in chosen:
            if checkpoint in damaged:
                continue
            try:
                _probe_checkpoint(checkpoint, tasks, file)
                steps.add(step_of(checkpoint))
            except (OSError, ValueError) as error:
                if not checkpoint.is_dir():
                    print(f"{checkpoint.name} was deleted meanwhile", flush=True)
                    continue
                damaged.add(checkpoint)
                print(f"{checkpoint} cannot be probed: {error}", flush=True)
    wanted = {(task.name, task.digest) for task in tasks}
    lines = [
        line
        for line in read_probes(run)
        if line["step"] in steps and (line["task"], line["data"]) in wanted
    ]
    if lines:
        print(f"\n{probe_table(lines)}")
    return int(bool(damaged))


def _chosen(options: argparse.Namespace) -> list[Path]:
    """Checkpoints, oldest first. ValueError where there is none that was asked for."""
    found = list_checkpoints(options.source)
    if not found:
        raise ValueError(f"{options.source} has no checkpoint yet: --watch waits for them")
    if options.step is None:
        return found[-1:] if options.newest else found
    chosen = [folder for folder in found if step_of(folder) == options.step]
    if not chosen:
        steps = ", ".join(str(step_of(folder)) for folder in found)
        raise ValueError(
            f"{options.source} has no checkpoint of step {options.step}: there are {steps}"
        )
    return chosen


def _watched(run: Path, every_seconds: float) -> Iterator[Path]:
    """Every checkpoint, at every look, until the run has finished."""
    while True:
        state = read_status(
            run, now=time.time()
        ).state  # before looking: the last one is there then
        yield from list_checkpoints(run)
        if state == "finished":
            return
        time.sleep(every_seconds)


def _probe_checkpoint(checkpoint: Path, tasks: list[LabelledTask], file: ProbeFile) -> None:
    """Probe what is not probed yet. ValueError and OSError where the checkpoint is damaged, or gone."""
    weights = _hash_of_weights(checkpoint)
    waiting = [task for task in tasks if not file.has((weights, task.name, task.digest))]
    if not waiting:
        return
    if (found := sha256_of(checkpoint / WEIGHTS)) != weights:
        raise ValueError(f"{WEIGHTS} has sha256 {found}, the manifest says {weights}")
    place = {"step": step_of(checkpoint), "num_tokens": read_state(checkpoint)["num_tokens"]}
    model = load_encoder(checkpoint / "hf")
    for task in waiting:
        began = time.monotonic()
        lines = probe_task(model, checkpoint / "hf", task)
        file.add([{**place, **line, "weights": weights} for line in lines])
        best = max(lines, key=lambda line: line["accuracy"])
        print(
            f"step {place['step']:,}  {task.name}: {best['accuracy']:.1%} right "
            f"({best['probe']}, {best['features']}), majority class {best['majority_accuracy']:.1%}  "
            f"[{time.monotonic() - began:.1f} s]",
            flush=True,
        )


def _hash_of_weights(checkpoint: Path) -> str:
    """sha256, as the checkpoint's manifest has it."""
    path = checkpoint / "MANIFEST.json"
    try:
        return str(read_small_json(path)["files"][WEIGHTS]["sha256"])
    except (KeyError, TypeError):
        raise ValueError(f"{path} has no hash of {WEIGHTS}") from None
