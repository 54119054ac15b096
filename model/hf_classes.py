"""The folder of a whole model in, one for a single `transformers` class out, with no weight too many.

A folder with both heads loads into every BERT class, but `transformers` then reports the weights that
a class has no use for. Whoever publishes an encoder alone wants a folder without them.
"""

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors.torch import save_file

from model.hf import read_safetensors
from model.hf_config import OURS, read_config, read_object
from model.hf_parity import REPORT_FILE
from model.hf_tokenizer import TOKENIZER_FILES

COPIED = ("README.md", REPORT_FILE, *TOKENIZER_FILES)  # what else is in the folder is not ours
Kind = Literal["pretraining", "masked-lm", "encoder"]


class HfClass(NamedTuple):
    name: str
    needed: tuple[str, ...]  # what the names of weights that it cannot do without begin with
    left_out: tuple[str, ...]  # the same of those that it has no use for
    prefix: str  # that it does not have


PREDICTIONS, NEXT = "cls.predictions.", "cls.seq_relationship."
KINDS: dict[str, dict[Kind, HfClass]] = {  # by model_type
    "bert": {
        "pretraining": HfClass("BertForPreTraining", (PREDICTIONS, NEXT), (), ""),
        "masked-lm": HfClass("BertForMaskedLM", (PREDICTIONS,), ("bert.pooler.", NEXT), ""),
        "encoder": HfClass("BertModel", (), ("cls.",), "bert."),
    },
    "electra": {
        "pretraining": HfClass("ElectraForPreTraining", ("discriminator_",), (), ""),
        "encoder": HfClass("ElectraModel", (), ("discriminator_",), "electra."),
    },
    "modernbert": {
        "masked-lm": HfClass("ModernBertForMaskedLM", ("head.",), (), ""),
        "encoder": HfClass("ModernBertModel", (), ("head.", "decoder."), "model."),
    },
}


def export_class(source: Path, target: Path, kind: Kind | None = None) -> str:
    """Write the part of `source`, a folder of `model.hf.export_hf`, that a class has; returns its name.

    kind: None is the folder's own class. Heads in files beside, which no class has, stay behind.
    target: must not exist, or be empty; it appears when it is complete. ValueError otherwise, where
    the architecture has no such class, or the model lacks a head of it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty: give a new folder")
    read_config(source)  # ValueError for what is none of ours
    config = read_object(source / "config.json")
    weights = read_safetensors(source / "model.safetensors")
    hf_class = _class_of(kind, config, weights)
    weights = {
        name.removeprefix(hf_class.prefix): value
        for name, value in weights.items()
        if not name.startswith(hf_class.left_out)
    }
    config["architectures"] = [hf_class.name]
    config.pop(OURS, None)  # the tasks of heads that stay behind
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


def _class_of(kind: Kind | None, config: dict[str, Any], weights: Collection[str]) -> HfClass:
    """ValueError where the model is none of that kind."""
    if kind is None:
        return HfClass(config["architectures"][0], (), (), "")
    classes = KINDS[config["model_type"]]
    if kind not in classes:
        raise ValueError(
            f"{config['model_type']} has no {kind} class: take one of {', '.join(classes)}"
        )
    needed = classes[kind].needed
    if lacking := [part for part in needed if not any(name.startswith(part) for name in weights)]:
        raise ValueError(
            f"this model was not trained with what {classes[kind].name} needs: no {', '.join(lacking)} "
            "among its weights"
        )
    return classes[kind]
