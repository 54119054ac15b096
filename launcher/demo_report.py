"""A finished run's folder and its dataset in, a page of plain text out: the curve, figures, examples."""

import json
import logging
import math
import statistics
from pathlib import Path
from typing import Any

from data.shards import Dataset

SENTENCES = (
    "Returns True if the file [MASK], False otherwise.",
    "Raises a [MASK] if the argument is out of range.",
    "The default [MASK] is None.",
    "A list of strings, each of [MASK] is the name of a column.",
    "If the shapes of the two [MASK] do not match, an error is raised.",
)
NUM_GUESSES = 3

Points = list[tuple[float, float]]


def report(run: Path, dataset: Path) -> str:
    """What a run has learned, next to what can be had without learning."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    train, heldout = ([m for m in metrics if m["kind"] == kind] for kind in ("train", "heldout"))
    manifest = Dataset.open(dataset).manifest
    entropy = manifest["unigram_entropy_nats"]
    curve = render_curve(
        {".": mlm_points(train), "o": mlm_points(heldout)}, (entropy, "unigram entropy")
    )
    newest = max((run / "checkpoints").glob("step-*")) / "hf"
    parts = [
        f"Loss of the masked tokens in nats (. training, o held-out):\n\n{curve}",
        figures(train, heldout[-1], manifest),
        f'transformers.pipeline("fill-mask", model="{newest}"):\n\n{fill_masks(newest)}',
    ]
    return "\n\n".join(parts) + "\n"


def mlm_points(metrics: list[dict[str, Any]]) -> Points:
    return [(m["step"], m["mlm_loss"]) for m in metrics]


def render_curve(
    curves: dict[str, Points], level: tuple[float, str], *, width: int = 64, height: int = 16
) -> str:
    """Points drawn with characters, later curves over earlier ones, over a line at a named level.

    curves: mark -> (x, y) points, x from 0 up. Every row is labelled with its y, the line with its own.
    """
    line, name = level
    points = [point for curve in curves.values() for point in curve]
    low = min(line, *(y for _, y in points))
    high = max(line, *(y for _, y in points))
    x_max = max(x for x, _ in points)

    def row_of(y: float) -> int:
        return round((high - y) / (high - low or 1.0) * (height - 1))

    grid = [[" "] * width for _ in range(height)]
    grid[row_of(line)] = ["-"] * width
    for mark, curve in curves.items():
        for x, y in curve:
            grid[row_of(y)][round(x / (x_max or 1) * (width - 1))] = mark
    rows = []
    for number, cells in enumerate(grid):
        on_line = number == row_of(line)
        y = line if on_line else high - (high - low) * number / (height - 1)
        rows.append(f"{y:7.3f} |{''.join(cells)}{f'  {name}' if on_line else ''}".rstrip())
    return "\n".join([*rows, f"{'step':>7} +{'0':<{width - 8}}{x_max:>8,.0f}"])


def figures(train: list[dict[str, Any]], heldout: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The last evaluation against guessing, and the speed."""
    seconds = sum(
        now["step_seconds"] * (now["step"] - before)
        for now, before in zip(train, [0, *(m["step"] for m in train)], strict=False)
    )
    speed = statistics.median(m["tokens_per_second"] for m in train)
    entropy, context_free = (
        manifest[name] for name in ("unigram_entropy_nats", "context_free_loss_nats")
    )
    rows = (
        ("held-out, after training", f"step {heldout['step']}", "without learning"),
        ("masked tokens: loss", f"{heldout['mlm_loss']:.3f}", f"{entropy:.3f} by token frequency"),
        ("", "", f"{context_free:.3f} the best without context"),
        ("masked tokens: right", f"{heldout['mlm_accuracy']:.1%}", ""),
        ("next sentence: loss", f"{heldout['nsp_loss']:.3f}", f"{math.log(2):.3f} by a coin"),
        ("next sentence: right", f"{heldout['nsp_accuracy']:.1%}", "50.0% by a coin"),
    )
    table = "\n".join(f"{a:<26}{b:>10}    {c}".rstrip() for a, b, c in rows)
    tokens = train[-1]["num_tokens"]
    return (
        f"{table}\n\n{tokens:,} tokens in {seconds:,.0f} s of training: "
        f"{speed:,.0f} tokens/s, the median of {len(train)} windows"
    )


def fill_masks(folder: Path) -> str:
    """Each of SENTENCES with the likeliest tokens for its [MASK]."""
    from transformers import pipeline  # takes seconds, and the training is over by now

    logging.getLogger("transformers").setLevel(logging.ERROR)
    fill = pipeline("fill-mask", model=str(folder), device=-1)
    lines = []
    for sentence in SENTENCES:
        guesses = fill(sentence, top_k=NUM_GUESSES)
        shown = ", ".join(f"{g['token_str'].strip()} {g['score']:.0%}" for g in guesses)
        lines.append(f"  {sentence}\n      {shown}")
    return "\n".join(lines)
