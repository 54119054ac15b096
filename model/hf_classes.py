"""The folder of a whole model in, one for a single `transformers` class out, with no weight too many.

A folder with both heads loads into every BERT class, but `transformers` then reports the weights that
a class has no use for. Whoever publishes an encoder alone wants a folder without them.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file, save_file

Architecture = Literal["BertForPreTraining", "BertForMaskedLM", "BertModel"]
LEFT_OUT: dict[Architecture, tuple[str, ...]] = {
    "BertForPreTraining": (),
    "BertForMaskedLM": ("bert.pooler.", "cls.seq_relationship."),
    "BertModel": ("cls.",),
}


def export_class(source: Path, target: Path, architecture: Architecture) -> None:
    """Write the part of `source`, a folder of `model.hf.export_hf`, that `architecture` has.

    target: must not exist, or be empty; it appears when it is complete. ValueError otherwise.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty: give a new folder")
    weights = {
        name.removeprefix("bert.") if architecture == "BertModel" else name: value
        for name, value in load_file(source / "model.safetensors").items()
        if not name.startswith(LEFT_OUT[architecture])
    }
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = [architecture]
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    shutil.copytree(source, staged, ignore=shutil.ignore_patterns("model.safetensors"))
    save_file(weights, staged / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    (staged / "config.json").write_text(text, encoding="utf-8")
    os.replace(staged, target)
