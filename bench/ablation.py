"""A prepared dataset and labelled sets in, which objectives help on this text out: tables in Markdown.

    python -m bench.ablation PRESET DATASET LABELLED OUT [key=value ...] [--seeds 3] [--jobs 2]
        [--columns cola=2,4] [--mixtures mlm mlm+nsp wwm+sop=1,mlm+relative=1]

Every mixture is trained on the same tokens, once a seed, by the preset with the overrides given, each run in
a process of one thread; then its last checkpoint is probed, and evaluated on all held-out rows. "untrained" is
the network before its first step. What is finished is not done again: the same command goes on, or prints the
tables.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from data.chance import Chance
from data.objectives import read_mixture
from launcher.status import read_status
from trainer.thermometer import readings_of

UNTRAINED = "untrained"
MIXTURES = (
    UNTRAINED, "mlm", "mlm+nsp", "mlm+sop", "wwm", "span", "rtd", "clm", "mlm+contrastive",
    "mlm+word_order+order", "mlm+nsp=1,wwm+sop=1,mlm+relative=1",
)  # fmt: skip
NO_STEP = ("steps=1", "optim.warmup_steps=0", "optim.learning_rate=1e-30")
DROPOUT = "model.hidden_dropout_prob=0.1"  # without any, the two views of contrastive are the same


class Trial(NamedTuple):
    mixture: str
    seed: int
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.log"

    @property
    def evaluation(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.evaluation.json"


def overrides_of(mixture: str) -> list[str]:
    """Of the preset; a mixture is RECIPE[=WEIGHT],..."""
    if mixture == UNTRAINED:
        return ["data.objectives={mlm: 1}", *NO_STEP]
    shares = ", ".join(f"{recipe}: {weight}" for recipe, weight in objectives_of(mixture).items())
    return [f"data.objectives={{{shares}}}", *([DROPOUT] if "contrastive" in mixture else [])]


def objectives_of(mixture: str) -> dict[str, int]:
    """ValueError for what is no mixture, such as an override of the preset behind --mixtures."""
    pairs = [part.partition("=")[::2] for part in mixture.split(",")]
    objectives = {recipe: int(weight or 1) for recipe, weight in pairs}
    read_mixture(objectives)
    return objectives


def run_trial(trial: Trial, options: argparse.Namespace) -> None:
    """Train, probe and evaluate what of it is not there. RuntimeError names the log of what failed."""
    trial.folder.parent.mkdir(parents=True, exist_ok=True)
    cloze = [sys.executable, "-m", "launcher.cli"]
    if not is_trained(trial):
        train = [sys.executable, "-m", "launcher.train", str(options.preset)]
        call(
            [
                *train, *options.overrides, *overrides_of(trial.mixture), f"data.path={options.dataset}",
                f"dir={trial.folder}", f"seed={trial.seed}",
            ], trial,
        )  # fmt: skip
    if not (trial.folder / "probes.jsonl").exists():
        columns = [f"--columns={given}" for given in options.columns]
        call(
            [*cloze, "probe", str(trial.folder), str(options.labelled), "--newest", *columns], trial
        )
    if not trial.evaluation.exists():
        found = call([*cloze, "evaluate", str(trial.folder), "--json"], trial)
        trial.evaluation.write_text(found, encoding="utf-8")


def is_trained(trial: Trial) -> bool:
    """To the end: a run that was killed has checkpoints, too."""
    has_begun = (trial.folder / "config.yaml").is_file()
    return has_begun and read_status(trial.folder, now=time.time()).state == "finished"


def call(command: list[str], trial: Trial) -> str:
    """What it prints. Its complaints go to the trial's log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with trial.log.open("a", encoding="utf-8") as log:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, check=False
        )
        log.write(done.stdout)
    if done.returncode:
        raise RuntimeError(f"{trial.log}: status {done.returncode} of {' '.join(command)}")
    return done.stdout


def run_all(trials: list[Trial], options: argparse.Namespace) -> int:
    """--jobs of them at the same time. How many failed: each is told of, and the others are made."""
    began, num_failed = time.monotonic(), 0
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(run_trial, trial, options) for trial in trials]
        for number, (trial, future) in enumerate(zip(trials, futures, strict=True), 1):
            problem = future.exception()
            num_failed += problem is not None
            passed = time.monotonic() - began
            said = problem or "done"
            print(
                f"{number}/{len(trials)} {trial.mixture} seed {trial.seed}: {said} ({passed:.0f} s)",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return num_failed


def probe_table(trials: list[Trial], features: str) -> Iterator[str]:
    """The linear probe on these features: mean over seeds, least to most."""
    lines = {trial: _probes(trial, features) for trial in trials}
    tasks = list(dict.fromkeys(task for found in lines.values() for task in found))
    yield "| objectives | seeds | " + " | ".join(tasks) + " |"
    yield "|---" * (len(tasks) + 2) + "|"
    first = next((found for found in lines.values() if found), {})
    majority = [f"{first[task]['majority_score']:.1f}" for task in tasks]
    yield f"| the commonest class | | {' | '.join(majority)} |"
    for mixture in dict.fromkeys(trial.mixture for trial in trials):
        of_it = [found for trial, found in lines.items() if trial.mixture == mixture and found]
        if of_it:
            cells = [
                spread([found[task]["score"] for found in of_it if task in found]) for task in tasks
            ]
            yield f"| {mixture.replace(',', ', ')} | {len(of_it)} | {' | '.join(cells)} |"


def _probes(trial: Trial, features: str) -> dict[str, dict[str, float]]:
    """Task -> its metric, in %, and that of guessing the commonest class."""
    path = trial.folder / "probes.jsonl"
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        line["task"]: {
            "score": 100 * line["score"],
            "majority_score": 100 * line["majority_score"],
        }
        for line in lines
        if line["probe"] == "linear" and line["features"] == features
    }


def spread(values: list[float], digits: int = 1) -> str:
    """'61.2 (60.8 to 61.9)'."""
    mean, low, high = (
        f"{v:.{digits}f}" for v in (statistics.mean(values), min(values), max(values))
    )
    return mean if len(values) < 2 else f"{mean} ({low} to {high})"


def heldout_table(trials: list[Trial]) -> Iterator[str]:
    """Every task's loss on all held-out rows beside guessing: mean over seeds, least to most."""
    header = (
        "objectives", "task", "by guessing, nats", "reached, nats", "by guessing, right", "right, %",
        "better than guessing in", "labels", "tokens trained on",
    )  # fmt: skip
    yield f"| {' | '.join(header)} |"
    yield "|---" * 9 + "|"
    for mixture in dict.fromkeys(trial.mixture for trial in trials if trial.mixture != UNTRAINED):
        of_it = [
            trial for trial in trials if trial.mixture == mixture and trial.evaluation.exists()
        ]
        reports = [json.loads(trial.evaluation.read_text(encoding="utf-8")) for trial in of_it]
        if reports:
            yield from _heldout_lines(mixture, num_tokens_of(of_it[0]), reports)


def num_tokens_of(trial: Trial) -> int:
    """That the run was trained on."""
    lines = (trial.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(json.loads(line).get("num_tokens", 0) for line in lines)


def _heldout_lines(mixture: str, num_tokens: int, reports: list[dict[str, Any]]) -> Iterator[str]:
    """Of every task. The line of guessing is that of the first seed: others ask other rows nearly the same."""
    readings = [
        {
            found.task: found
            for found in readings_of({**report["together"], "guessing": report["guessing"]})
        }
        for report in reports
    ]
    for task, first in readings[0].items():
        of_seeds = [of_seed[task] for of_seed in readings]
        num_better = sum(reading.level == "better" for reading in of_seeds)
        guess = first.line or Chance(math.nan, None)
        cells = [
            mixture.replace(",", ", "), task, f"{guess.loss_nats:.3f}",
            spread([reading.loss for reading in of_seeds], 3),
            "" if guess.accuracy is None else f"{guess.accuracy:.1%}",
            spread([100 * reading.accuracy for reading in of_seeds]), f"{num_better} of {len(reports)}",
            f"{first.num_labels:,}", f"{num_tokens:,}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("preset", type=Path)
    add("dataset", type=Path, help="a folder written by `cloze prepare`")
    add("labelled", type=Path, help="labelled sets, as of `cloze probe`")
    add("out", type=Path, help="folder of all runs")
    add("overrides", nargs="*", metavar="key=value", help="of the preset")
    add("--mixtures", nargs="+", default=MIXTURES)
    add("--seeds", type=int, default=3)
    add("--jobs", type=int, default=2, help="runs at the same time")
    add("--tables", action="store_true", help="train nothing: the tables of what is there")
    add("--columns", action="append", default=[], help="as of `cloze probe`")
    options = parser.parse_intermixed_args()
    for mixture in options.mixtures:
        try:
            objectives_of("mlm" if mixture == UNTRAINED else mixture)
        except ValueError as error:
            parser.error(f"--mixtures {mixture}: {error}; give key=value before --mixtures")
    trials = [
        Trial(mixture, seed, options.out / mixture / f"seed-{seed}")
        for seed in range(1, options.seeds + 1)
        for mixture in options.mixtures
    ]
    num_failed = 0 if options.tables else run_all(trials, options)
    for title, lines in (
        ("Held-out rows", heldout_table(trials)),
        ("Linear probe on the mean of the last layer, %", probe_table(trials, "mean")),
        ("Linear probe on [CLS], %", probe_table(trials, "cls")),
    ):
        print(f"\n{title}\n")
        print("\n".join(lines), flush=True)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
