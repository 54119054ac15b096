"""What `cloze evaluate` has measured in, a page of plain text out."""

from collections.abc import Iterable, Mapping
from typing import Any

from launcher.tables import text_table
from trainer.thermometer import readings_of

TOGETHER = "all together"


def as_text(report: Mapping[str, Any]) -> str:
    """Where it comes from; a table of the sources and all together; what is had without learning."""
    step = f", step {report['step']}" if report["step"] is not None else ""
    parts = [
        f"{report['model']}{step}, on the held-out rows of {report['dataset']}: "
        f"{report['sequence_length']} slots, {report['precision']} on {report['device']}",
        _table(report),
        "\n".join(_guessing_lines(report)),
    ]
    if pseudo := report.get("pseudo"):
        parts.append(
            f"each token masked alone, in {pseudo['together']['num_documents']:,} documents:"
            f"\n\n{_table(pseudo)}"
        )
    return "\n\n".join(parts)


def _table(measured: Mapping[str, Any]) -> str:
    """A line for each source, where there are several, and one for all together."""
    rows: dict[str, Mapping[str, float]] = dict(measured["sources"])
    rows = {**rows, TOGETHER: measured["together"]} if len(rows) > 1 else rows
    names = _in_order(name for values in rows.values() for name in values)
    header = ["source", *(_heading(name) for name in names)]
    cells = [
        [source, *(_cell(name, values.get(name)) for name in names)]
        for source, values in rows.items()
    ]
    return text_table(header, cells)


def _in_order(names: Iterable[str]) -> list[str]:
    """Counts first, then what belongs to an objective side by side; without the sum of the losses."""
    found = [name for name in dict.fromkeys(names) if name != "loss"]
    counts = [name for name in found if name.startswith("num_")]
    objectives = dict.fromkeys(name.partition("_")[0] for name in found if name not in counts)
    return counts + [
        name
        for objective in objectives
        for name in found
        if name not in counts and name.partition("_")[0] == objective
    ]


def _heading(name: str) -> str:
    return name.removeprefix("num_").replace("_", " ")


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.startswith("num_"):
        return f"{value:,}"
    if name.endswith("_accuracy"):
        return f"{value:.2%}"
    return f"{value:.2f}" if name.endswith("_perplexity") else f"{value:.4f}"


def _guessing_lines(report: Mapping[str, Any]) -> list[str]:
    """Of every task: what is had without learning, and what the model has learnt."""
    lines = []
    for reading in readings_of({**report["together"], "guessing": report["guessing"]}):
        guesses = [
            f"{nats:.4f} {how}" + (f" ({accuracy:.2%} right)" if accuracy is not None else "")
            for how, (nats, accuracy) in report["guessing"].get(reading.task, {}).items()
        ]
        said = f"{reading.task} {reading.words}"
        lines.append(f"{said}; without learning: {', '.join(guesses)}" if guesses else said)
    return lines
