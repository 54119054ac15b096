"""A run's folder in, the lines of its probes.jsonl out. Light, for `cloze status` reads them."""

from pathlib import Path
from typing import Any

from launcher.jobs import json_lines

PROBES_FILE = "probes.jsonl"
NEEDED = {
    "step", "num_tokens", "task", "probe", "features", "accuracy", "majority_accuracy", "weights", "data",
}  # fmt: skip


def read_probes(run: Path) -> list[dict[str, Any]]:
    """Whole lines, oldest first; none where the run was not probed. What a kill has cut is passed over."""
    path = run / PROBES_FILE
    if not path.is_file():
        return []
    lines = json_lines(path.read_text(encoding="utf-8", errors="replace"))
    return [line for line in lines if line.get("kind") == "probe" and line.keys() >= NEEDED]
