"""A tokenizer's folder in, the same tokenizer beside a model out: with that model's length and inputs."""

import json
import shutil
from pathlib import Path
from typing import Any

from model.config import Architecture, ModelConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentencepiece.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
INPUT_NAMES: dict[Architecture, list[str]] = {
    "bert": ["input_ids", "token_type_ids", "attention_mask"],
    "modernbert": ["input_ids", "attention_mask"],
}


def copy_tokenizer(source: Path, folder: Path, config: ModelConfig) -> None:
    """Copy what there is of `TOKENIZER_FILES`.

    tokenizer_config.json gets the model's longest row, at which tools cut texts, and the names of its
    inputs: an ONNX session refuses token types where there are none. It is copied as it is where both
    are right. ids do not depend on either.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    changed = content | {
        "model_max_length": config.max_position_embeddings,
        "model_input_names": INPUT_NAMES[config.architecture],
    }
    if changed != content:
        text = json.dumps(changed, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


def special_ids(folder: Path) -> dict[str, int]:
    """Of every added token of tokenizer.json. ValueError without [PAD]."""
    path = folder / "tokenizer.json"
    tokens = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    if "[PAD]" not in ids:
        raise ValueError(f"{path} has no [PAD] token")
    return ids
