"""Lines of probes in, the tables that a person reads out."""

from collections.abc import Sequence
from typing import Any

from launcher.tables import text_table

HEADER = ("task", "probe", "features", "right", "95 % interval", "metric", "score", "rows")


def probe_table(lines: Sequence[dict[str, Any]]) -> str:
    """Every probe of each task at its newest step, below the line of guessing the majority class.

    Where there are several steps, the accuracy of the linear probe on mean-pooled features at each, too. A star
    marks what is right more often than the majority class, by the whole interval.
    """
    parts = []
    steps = sorted({line["step"] for line in lines if "step" in line})
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    if len(steps) > 1:
        parts.append(_by_step(lines, steps, tasks))
    rows: list[Sequence[str]] = []
    for task in tasks:
        of_task = [line for line in lines if line["task"] == task]
        newest = max(line.get("step", 0) for line in of_task)
        rows += _rows([line for line in of_task if line.get("step", 0) == newest])
    table = text_table(HEADER, rows)
    parts.append(
        f"{_title(lines, steps)}\n{table}\n* above the majority class, by the whole interval"
    )
    return "\n\n".join(parts)


def _title(lines: Sequence[dict[str, Any]], steps: list[int]) -> str:
    if not steps:
        return "linear: logistic regression; knn: vote of 10 nearest by cosine; last layer, standardised"
    tokens = max(line["num_tokens"] for line in lines if line["step"] == steps[-1])
    return f"step {steps[-1]:,}, {tokens:,} tokens (last layer, standardised)"


def _rows(lines: Sequence[dict[str, Any]]) -> list[Sequence[str]]:
    first = lines[0]
    num_rows = f"{first['num_evaluated']:,} of {first['split']}"
    chance = (
        first["task"], "majority class", "", f"{first['majority_accuracy']:.1%}", "", first["metric"],
        f"{first['majority_score']:.3f}", num_rows,
    )  # fmt: skip
    return [chance, *(_row(line, num_rows) for line in lines)]


def _row(line: dict[str, Any], num_rows: str) -> Sequence[str]:
    low, high = line["interval"]
    star = " *" if low > line["majority_accuracy"] else ""
    return (
        line["task"], line["probe"], line["features"], f"{line['accuracy']:.1%}",
        f"{low:.1%} to {high:.1%}{star}", line["metric"], f"{line['score']:.3f}", num_rows,
    )  # fmt: skip


def _by_step(lines: Sequence[dict[str, Any]], steps: list[int], tasks: list[str]) -> str:
    found = {
        (line["step"], line["task"]): f"{line['accuracy']:.1%}"
        for line in lines
        if (line["probe"], line["features"]) == ("linear", "mean")
    }
    tokens = {line["step"]: f"{line['num_tokens']:,}" for line in lines}
    rows = [
        (f"{step:,}", tokens[step], *(found.get((step, task), "-") for task in tasks))
        for step in steps
    ]
    majority = {line["task"]: f"{line['majority_accuracy']:.1%}" for line in lines}
    rows.append(("-", "-", *(majority[task] for task in tasks)))
    title = "linear probe on mean-pooled features, right; last line: the majority class"
    return f"{title}\n{text_table(('step', 'tokens', *tasks), rows)}"


def newest_probes_text(lines: Sequence[dict[str, Any]]) -> str:
    """One line of the newest step that was probed; empty where none was."""
    chosen = [line for line in lines if (line["probe"], line["features"]) == ("linear", "mean")]
    if not chosen:
        return ""
    step = max(line["step"] for line in chosen)
    found = {line["task"]: line for line in chosen if line["step"] == step}
    shown = (
        f"{task} {line['accuracy']:.1%} right (majority class {line['majority_accuracy']:.1%})"
        for task, line in found.items()
    )
    return f"linear probes at step {step:,}: " + ", ".join(shown)
