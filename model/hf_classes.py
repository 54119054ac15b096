"""The folder of a whole model in, one for a single `transformers` class out, with no weight too many.

A folder with both heads loads into every BERT class, but `transformers` then reports the weights that
a class has no use for. Whoever publishes an encoder alone wants a folder without them.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

from safetensors.torch import save_file

from model.hf import read_safetensors
from model.hf_config import read_config, read_object
from model.hf_parity import REPORT_FILE
from model.hf_tokenizer import TOKENIZER_FILES

COPIED = ("README.md", REPORT_FILE, *TOKENIZER_FILES)  # what else is in the folder is not ours
Kind = Literal["pretraining", "masked-lm", "encoder"]


class HfClass(NamedTuple):
    name: str
    left_out: tuple[str, ...]  # what the names of weights that it has no use for begin with
    prefix: str  # that it does not have


CLASSES: dict[str, dict[Kind, HfClass]] = {  # by model_type
    "bert": {
        "pretraining": HfClass("BertForPreTraining", (), ""),
        "masked-lm": HfClass("BertForMaskedLM", ("bert.pooler.", "cls.seq_relationship."), ""),
        "encoder": HfClass("BertModel", ("cls.",), "bert."),
    },
    "modernbert": {
        "masked-lm": HfClass("ModernBertForMaskedLM", (), ""),
        "encoder": HfClass("ModernBertModel", ("head.", "decoder."), "model."),
    },
}


def export_class(source: Path, target: Path, kind: Kind | None = None) -> str:
    """Write the part of `source`, a folder of `model.hf.export_hf`, that a class has; returns its name.

    kind: None is the class with the most heads.
    target: must not exist, or be empty; it appears when it is complete. ValueError otherwise, or where
    the architecture has no such class.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty: give a new folder")
    read_config(source)  # ValueError for what is none of ours
    config = read_object(source / "config.json")
    classes = CLASSES[config["model_type"]]
    kind = kind or next(iter(classes))
    if kind not in classes:
        raise ValueError(
            f"{config['model_type']} has no {kind} class: take one of {', '.join(classes)}"
        )
    hf_class = classes[kind]
    weights = {
        name.removeprefix(hf_class.prefix): value
        for name, value in read_safetensors(source / "model.safetensors").items()
        if not name.startswith(hf_class.left_out)
    }
    config["architectures"] = [hf_class.name]
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    staged.mkdir()
    for name in COPIED:
        if (source / name).is_file() and not (source / name).is_symlink():
            shutil.copyfile(source / name, staged / name)
    save_file(weights, staged / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    (staged / "config.json").write_text(text, encoding="utf-8")
    os.replace(staged, target)
    return hf_class.name
