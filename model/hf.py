"""Weights in, a folder that `transformers` loads out; and such a folder in, weights out.

Weights are named as in `ForPreTraining.named_parameters()` here and as in transformers'
BertForPreTraining or ModernBertForMaskedLM there. Only safetensors are read and written: a pickled .bin
file can run code when it is loaded.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.config import Architecture, ModelConfig
from model.hf_config import ARCHITECTURES, COMPUTED, SHAPE_FIELDS, read_config, read_object
from model.hf_names import from_hf_names, to_hf_names
from model.hf_tokenizer import copy_tokenizer, special_ids
from model.weights import not_finite, parameter_shapes, weight_problems

SHARD_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\.safetensors")
NSP_FILE = "nsp_head.safetensors"  # modernbert: transformers has no class with this head
HEADS: dict[Architecture, tuple[str, ...]] = {
    "bert": ("cls.", "bert.pooler."),
    "modernbert": ("head.", "decoder.", "nsp_head."),
}
TIED: dict[
    Architecture, dict[str, str]
] = {  # names that some files have besides the original, or instead
    "bert": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    "modernbert": {"decoder.weight": "model.embeddings.tok_embeddings.weight"},
}
SPECIAL = {"pad_token_id": "[PAD]", "cls_token_id": "[CLS]", "sep_token_id": "[SEP]"}


def export_hf(
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    vocab_size: int,
    folder: Path,
    *,
    tokenizer_folder: Path | None,
    model_card: str | None,
) -> None:
    """Write model.safetensors (fp32), config.json, README.md and tokenizer files into `folder`.

    model_card: the README's text; None writes a short one. The padding token is the tokenizer's
    [PAD], or 0 without a tokenizer. ValueError, before anything is written, where weights are
    missing, unknown, wrongly shaped, NaN or infinite, or where there is no tokenizer.json.
    """
    problems = weight_problems(weights, parameter_shapes(config, vocab_size))
    problems += not_finite(weights.items())
    if tokenizer_folder and not (tokenizer_folder / "tokenizer.json").is_file():
        problems.append(f"{tokenizer_folder} has no tokenizer.json")
    if problems:
        raise ValueError(f"cannot export to {folder}: " + "; ".join(problems))
    ids = special_ids(tokenizer_folder) if tokenizer_folder else {"[PAD]": 0}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().to("cpu", torch.float32).contiguous()
        for name, value in to_hf_names(weights, config).items()
    }
    apart = {name: tensors.pop(name) for name in list(tensors) if name.startswith("nsp_head.")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if apart:
        save_file(apart, folder / NSP_FILE, metadata={"format": "pt"})
    _write_json(folder / "config.json", hf_config(config, vocab_size, ids))
    (folder / "README.md").write_text(
        model_card or _default_card(config, vocab_size), encoding="utf-8"
    )
    if tokenizer_folder:
        copy_tokenizer(tokenizer_folder, folder, config)


def hf_config(
    config: ModelConfig, vocab_size: int, special_ids: Mapping[str, int]
) -> dict[str, Any]:
    """The content of config.json. special_ids: of "[PAD]", and of "[CLS]" and "[SEP]" where known."""
    architecture = config.architecture
    content = {
        "architectures": [ARCHITECTURES[architecture][0]],
        "dtype": "float32",
        "pad_token_id": special_ids["[PAD]"],
        "vocab_size": vocab_size,
        **COMPUTED[architecture],
        **{theirs: getattr(config, ours) for ours, theirs in SHAPE_FIELDS[architecture].items()},
    }
    if architecture == "modernbert":
        layers = range(config.num_hidden_layers)
        content |= {name: special_ids.get(token) for name, token in SPECIAL.items()}
        content |= {
            "bos_token_id": special_ids.get("[CLS]"),
            "eos_token_id": special_ids.get("[SEP]"),
            "embedding_dropout": config.hidden_dropout_prob,
            "layer_types": [_layer_type(config, layer) for layer in layers],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "default",
                    "rope_theta": config.global_rope_theta,
                },
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": config.local_rope_theta,
                },
            },
        }
    return content


def _layer_type(config: ModelConfig, layer: int) -> str:
    return "full_attention" if config.window_of_layer(layer) is None else "sliding_attention"


def import_hf(
    folder: Path, *, allow_missing_heads: bool = False
) -> tuple[dict[str, torch.Tensor], ModelConfig, int]:
    """fp32 weights, shape, vocabulary size of one of `ARCHITECTURES`.

    allow_missing_heads: accept that weights of the heads (masked language model, pooler, next
    sentence) are absent; `missing_weights` tells which. ValueError, naming every key concerned,
    where the folder is incomplete, is of another architecture or a variant that we do not
    compute, or holds other tensors than it should, or NaN.
    """
    config, vocab_size = read_config(folder)
    tensors = _normalise(_read_tensors(folder), config.architecture)
    problems = _take_out_tied(tensors, config.architecture)
    ours = parameter_shapes(config, vocab_size)
    with torch.device("meta"):
        theirs = to_hf_names({name: torch.empty(shape) for name, shape in ours.items()}, config)
    heads = HEADS[config.architecture]
    may_miss = [name for name in theirs if allow_missing_heads and name.startswith(heads)]
    problems += weight_problems(
        tensors, {name: value.shape for name, value in theirs.items()}, may_miss=may_miss
    )
    problems += not_finite(tensors.items())
    if problems:
        raise ValueError(f"cannot import {folder}: " + "; ".join(problems))
    found = from_hf_names(tensors, config)
    weights = {name: found[name].to(torch.float32) for name in ours if name in found}
    return weights, config, vocab_size


def missing_weights(
    weights: Mapping[str, torch.Tensor], config: ModelConfig, vocab_size: int
) -> list[str]:
    """Names of the model's weights that are not there: what `load_weights` is to allow."""
    return [name for name in parameter_shapes(config, vocab_size) if name not in weights]


def _normalise(
    tensors: Mapping[str, torch.Tensor], architecture: Architecture
) -> dict[str, torch.Tensor]:
    """Today's names of the class with a head for those of a bare encoder and of old files."""
    if architecture == "modernbert":
        bare = ("embeddings.", "layers.", "final_norm.")
        return {
            f"model.{name}" if name.startswith(bare) else name: value
            for name, value in tensors.items()
        }
    renamed = {}
    for name, value in tensors.items():
        if name.endswith("embeddings.position_ids"):  # 0, 1, 2, ...: no weight
            continue
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )
        bare = name.startswith(("embeddings.", "encoder.", "pooler."))
        renamed[f"bert.{name}" if bare else name] = value
    return renamed


def _take_out_tied(tensors: dict[str, torch.Tensor], architecture: Architecture) -> list[str]:
    """Leave the original of tied weights only, in place; returns what contradicts."""
    problems = []
    for name, original in TIED[architecture].items():
        value = tensors.pop(name, None)
        if value is not None and not torch.equal(tensors.setdefault(original, value), value):
            problems.append(f"{name} differs from {original}: they must be tied")
    return problems


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif index.is_file():
        weight_map = read_object(index).get("weight_map")
        files = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        if wrong := [name for name in files if not SHARD_FILE.fullmatch(name)] or not files:
            raise ValueError(f"{index} names {wrong if files else 'nothing'}: no files beside it")
    else:
        problem = f"{folder} has no model.safetensors"
        if pickled := sorted(path.name for path in folder.glob("*.bin")):
            problem += (
                f". {', '.join(pickled)} is not read, for unpickling can run code: convert it"
            )
        raise ValueError(problem)
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {', '.join(absent)}, named in {index.name}")
    if (folder / NSP_FILE).is_file():
        files.append(NSP_FILE)
    return {
        name: value for file in files for name, value in read_safetensors(folder / file).items()
    }


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """ValueError, naming the file, where it is damaged or no such file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _default_card(config: ModelConfig, vocab_size: int) -> str:
    auto = "BertForPreTraining" if config.architecture == "bert" else "ModernBertForMaskedLM"
    source = (
        "BERT (Devlin et al. 2019)"
        if config.architecture == "bert"
        else "ModernBERT (Warner et al. 2024)"
    )
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
---

{source}, pretrained with masked language modelling and next sentence prediction:
{config.num_hidden_layers} layers, hidden size {config.hidden_size}, \
{config.num_attention_heads} heads, {vocab_size} tokens, \
sequences up to {config.max_position_embeddings} tokens, fp32 weights.

```python
from transformers import AutoTokenizer, {auto}

tokenizer = AutoTokenizer.from_pretrained(".")
model = {auto}.from_pretrained(".")
```
"""
