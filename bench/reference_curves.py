"""Finished runs in, trainer/reference_curves.py out: how far their held-out losses were after how many tokens.

    python -m bench.reference_curves RUN... > trainer/reference_curves.py

Those of the ablation (bench/ablation.py) are meant. Every loss is a share of that of guessing, which is counted
anew on the rows that the run was evaluated on. Runs of several recipes count only for tasks that fewer than two
others have.
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.batch import Reader, evaluation_batches
from data.chance import asked_of
from data.shards import Dataset
from trainer.config import RunConfig, load_config
from trainer.evaluation import guessing_of
from trainer.phases import settings_at
from trainer.thermometer import tokens_of_task

MARKS = (
    200_000, 400_000, 700_000, 1_000_000, 1_400_000, 2_000_000, 2_800_000, 4_000_000,
    6_000_000, 9_000_000, 13_000_000, 18_000_000,
)  # fmt: skip
HEADER = '''"""Losses of our own runs after so many tokens, as shares of the loss of guessing.

Written by `python -m bench.reference_curves` of {num_runs} runs:
{about}.
"""

# task -> (tokens of rows that ask it, lowest, highest), ascending
REFERENCE: dict[str, tuple[tuple[float, float, float], ...]] = {{'''


class Curve(NamedTuple):
    """Of one task of one run; ascending."""

    num_tokens: list[float]
    shares: list[float]  # of the loss of guessing


def curves_of(run: Path) -> dict[str, Curve]:
    """Of each task that was evaluated."""
    config = load_config(run / "config.yaml", [])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    tokens = {line["step"]: line["num_tokens"] for line in lines if line["kind"] == "train"}
    heldout = [line for line in lines if line["kind"] == "heldout"]
    asked, dataset = asked_in_evaluation(config), Dataset.open(config.data.path)
    curves: dict[str, Curve] = {}
    for line in heldout:
        for task, guess in guessing_of(line, asked, dataset.manifest).items():
            curve = curves.setdefault(task, Curve([], []))
            trained = tokens_of_task(task, config.data.mixture, tokens[line["step"]])
            curve.num_tokens.append(trained)
            curve.shares.append(line[f"{task}_loss"] / next(iter(guess.values())).loss_nats)
    return curves


def has_one_recipe(run: Path) -> bool:
    return len(load_config(run / "config.yaml", []).data.mixture.recipes) == 1


def asked_in_evaluation(config: RunConfig) -> Mapping[str, np.ndarray]:
    """What one rank's evaluation asks of each task."""
    settings = settings_at(config, 0)
    reader = Reader(0, 1, settings.micro_batch_size, settings.global_batch_size, config.seed)
    dataset, asked = Dataset.open(config.data.path, config.data.storage), {}
    for _, batch, _ in evaluation_batches(dataset, settings.data, reader, config.eval_rows):
        for task, counts in asked_of(batch).items():
            asked[task] = asked.get(task, 0) + counts
    return asked


def share_at(curve: Curve, num_tokens: float) -> float | None:
    """Between two evaluations the logarithm of the tokens is interpolated; None outside of them."""
    points = zip(curve.num_tokens, curve.shares, strict=True)
    for (left, before), (right, after) in itertools.pairwise(points):
        if left <= num_tokens <= right:
            part = math.log(num_tokens / left) / math.log(right / left)
            return before + part * (after - before)
    return None


def marks_of(curves: list[Curve], marks: Sequence[int]) -> Iterator[tuple[int, float, float]]:
    """(tokens, lowest, highest) where at least two of a task's runs were measured, or its only one."""
    for mark in marks:
        shares = [share for curve in curves if (share := share_at(curve, mark)) is not None]
        if len(shares) >= min(2, len(curves)):
            yield mark, min(shares), max(shares)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--about", default="see bench/records", help="what the runs were")
    parser.add_argument("--marks", nargs="+", type=int, default=MARKS, help="tokens")
    options = parser.parse_intermixed_args()
    found: dict[str, dict[Path, Curve]] = {}
    for run in options.runs:
        for task, curve in curves_of(run).items():
            found.setdefault(task, {})[run] = curve
    print(HEADER.format(num_runs=len(options.runs), about=options.about))
    for task, curves in found.items():
        alone = [curve for run, curve in curves.items() if has_one_recipe(run)]
        marks = list(marks_of(alone if len(alone) > 1 else list(curves.values()), options.marks))
        if marks:
            print(f'    "{task}": (')
            for mark, low, high in marks:
                print(f"        ({mark}, {low:.3f}, {high:.3f}),")
            print("    ),")
    print("}")


if __name__ == "__main__":
    main()
