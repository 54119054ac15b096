"""Weights in, a folder that `transformers` loads out; and such a folder in, weights out.

Weights are named as in `ForPreTraining.named_parameters()` here, and there as in the class of transformers that
has most of the heads (`model.hf_kinds`). Only safetensors are read and written: a pickled .bin file can run
code when it is loaded.
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
from model.hf_card import card_of
from model.hf_config import COMPUTED, OURS, SHAPE_FIELDS, read_config, read_object
from model.hf_kinds import HEADS_FILE, NSP_FILE, HfKind, kind_of
from model.hf_names import from_hf_names, is_apart, to_hf_names
from model.hf_tokenizer import copy_tokenizer, special_ids
from model.tasks import DEFAULT_TASKS, heads_of
from model.weights import not_finite, parameter_shapes, weight_problems

SHARD_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\.safetensors")
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

    Heads that transformers has no class for go into `HEADS_FILE` or `NSP_FILE` beside.
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
    for file, part in _files(tensors, config).items():
        save_file(part, folder / file, metadata={"format": "pt"})
    _write_json(folder / "config.json", hf_config(config, vocab_size, ids))
    (folder / "README.md").write_text(card_of(model_card, config, vocab_size), encoding="utf-8")
    if tokenizer_folder:
        copy_tokenizer(tokenizer_folder, folder, config)


def _files(
    tensors: Mapping[str, torch.Tensor], config: ModelConfig
) -> dict[str, dict[str, torch.Tensor]]:
    """Hugging Face's names to the files that they go to."""
    kind = kind_of(config)
    files: dict[str, dict[str, torch.Tensor]] = {"model.safetensors": {}}
    for name, value in tensors.items():
        if is_apart(name, config):
            file = NSP_FILE if name.startswith("nsp_head.") else HEADS_FILE
            files.setdefault(file, {})[name] = value
        else:
            files["model.safetensors"][name.removeprefix(kind.prefix * kind.is_bare)] = value
    return files


def hf_config(
    config: ModelConfig, vocab_size: int, special_ids: Mapping[str, int]
) -> dict[str, Any]:
    """The content of config.json. special_ids: of "[PAD]", and of "[CLS]" and "[SEP]" where known."""
    architecture, kind = config.architecture, kind_of(config)
    content: dict[str, Any] = {
        "architectures": [kind.name],
        "model_type": kind.model_type,
        "dtype": "float32",
        "pad_token_id": special_ids["[PAD]"],
        "vocab_size": vocab_size,
        **COMPUTED[architecture],
        **{theirs: getattr(config, ours) for ours, theirs in SHAPE_FIELDS[architecture].items()},
    }
    if kind.model_type == "electra":
        content["embedding_size"] = config.hidden_size
    if config.tasks != DEFAULT_TASKS:
        content[OURS] = {
            "tasks": list(config.tasks), "generator_divisor": config.generator_divisor,
        }  # fmt: skip
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
    """fp32 weights, shape, vocabulary size of a class of `model.hf_kinds.CLASSES`.

    allow_missing_heads: accept that weights of the heads are absent; `missing_weights` tells which.
    ValueError, naming every key concerned, where the folder is incomplete, is of another architecture
    or a variant that we do not compute, or holds other tensors than it should, or NaN.
    """
    config, vocab_size = read_config(folder)
    tensors = _normalise(_read_tensors(folder), kind_of(config))
    problems = _take_out_tied(tensors, config.architecture)
    ours = parameter_shapes(config, vocab_size)
    with torch.device("meta"):
        empty = {name: torch.empty(shape) for name, shape in ours.items()}
    theirs = to_hf_names(empty, config)
    heads = tuple(f"{head}." for head in heads_of(config.tasks))
    of_heads = {name: value for name, value in empty.items() if name.startswith(heads)}
    may_miss = to_hf_names(of_heads, config) if allow_missing_heads else ()
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


def _normalise(tensors: Mapping[str, torch.Tensor], kind: HfKind) -> dict[str, torch.Tensor]:
    """Today's names of the class with a head for those of a bare encoder and of old files."""
    if kind.model_type == "modernbert":
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
        is_bare = name.startswith(("embeddings.", "encoder.", "pooler."))
        renamed[f"{kind.prefix}{name}" if is_bare else name] = value
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
    files += [name for name in (NSP_FILE, HEADS_FILE) if (folder / name).is_file()]
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
