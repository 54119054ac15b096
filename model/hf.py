"""Weights in, a folder that `transformers` loads out; and such a folder in, weights out.

Weights are named as in `BertForPreTraining.named_parameters()` here and as in transformers' class
of the same name there. Only safetensors are read and written: a pickled .bin file can run code when
it is loaded.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.bert import ModelConfig, parameter_shapes, weight_problems

ARCHITECTURES = ("BertForPreTraining", "BertForMaskedLM", "BertModel")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "sentencepiece.model",
    "vocab.txt",
)
HEADS = ("cls.", "bert.pooler.")
TIED = {  # names that some files have besides, or instead of, the original
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
SHAPE_FIELDS = tuple(  # of config.json; the rest is how we compute, not what
    field.name
    for field in fields(ModelConfig)
    if field.name not in ("attention", "activation_checkpointing")
)
COMPUTED = {  # the BERT of the paper; transformers' class has more variants
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "tie_word_embeddings": True,
    "is_decoder": False,
    "add_cross_attention": False,
}

# Our module, and its Hugging Face name. {} is the layer.
MODULES = {
    "embeddings.word_embeddings": "bert.embeddings.word_embeddings",
    "embeddings.position_embeddings": "bert.embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "bert.embeddings.token_type_embeddings",
    "embeddings.layer_norm": "bert.embeddings.LayerNorm",
    "mlm_head.transform": "cls.predictions.transform.dense",
    "mlm_head.layer_norm": "cls.predictions.transform.LayerNorm",
    "mlm_head.decoder": "cls.predictions",
    "nsp_head.pooler": "bert.pooler.dense",
    "nsp_head.classifier": "cls.seq_relationship",
}
LAYER_MODULES = {
    "layers.{}.attention_output": "bert.encoder.layer.{}.attention.output.dense",
    "layers.{}.attention_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
    "layers.{}.intermediate": "bert.encoder.layer.{}.intermediate.dense",
    "layers.{}.output": "bert.encoder.layer.{}.output.dense",
    "layers.{}.output_norm": "bert.encoder.layer.{}.output.LayerNorm",
}
QKV = "layers.{}.qkv"  # one projection of ours, query over key over value, is three of theirs
QKV_PARTS = tuple(
    f"bert.encoder.layer.{{}}.attention.self.{part}" for part in ("query", "key", "value")
)


def to_hf_names(
    weights: Mapping[str, torch.Tensor], config: ModelConfig
) -> dict[str, torch.Tensor]:
    """Our names to Hugging Face's, without copying; the fused projections become views of three."""
    renamed = {}
    for ours, theirs in _name_pairs(config):
        if ours in weights:
            parts = weights[ours].chunk(len(theirs)) if len(theirs) > 1 else (weights[ours],)
            renamed.update(zip(theirs, parts, strict=True))
    return renamed


def from_hf_names(
    weights: Mapping[str, torch.Tensor], config: ModelConfig
) -> dict[str, torch.Tensor]:
    """Hugging Face's names to ours; incomplete and unknown weights are left out."""
    renamed = {}
    for ours, theirs in _name_pairs(config):
        if all(name in weights for name in theirs):
            parts = [weights[name] for name in theirs]
            renamed[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return renamed


def _name_pairs(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each weight's name here, and its name, or its parts' names, there."""
    modules: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in MODULES.items()}
    for layer in range(config.num_hidden_layers):
        modules[QKV.format(layer)] = tuple(part.format(layer) for part in QKV_PARTS)
        for ours, theirs in LAYER_MODULES.items():
            modules[ours.format(layer)] = (theirs.format(layer),)
    for ours, theirs in modules.items():
        if ours == "mlm_head.decoder":  # its weight is the word embeddings
            yield f"{ours}.bias", ("cls.predictions.bias",)
            continue
        yield f"{ours}.weight", tuple(f"{name}.weight" for name in theirs)
        if not ours.endswith("_embeddings"):
            yield f"{ours}.bias", tuple(f"{name}.bias" for name in theirs)


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
    problems += [
        f"{name} has {int((~torch.isfinite(value)).sum())} NaN or infinite values"
        for name, value in weights.items()
        if not torch.isfinite(value).all()
    ]
    if tokenizer_folder and not (tokenizer_folder / "tokenizer.json").is_file():
        problems.append(f"{tokenizer_folder} has no tokenizer.json")
    if problems:
        raise ValueError(f"cannot export to {folder}: " + "; ".join(problems))
    pad_token_id = _pad_token_id(tokenizer_folder) if tokenizer_folder else 0
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().to("cpu", torch.float32).contiguous()
        for name, value in to_hf_names(weights, config).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", hf_config(config, vocab_size, pad_token_id))
    (folder / "README.md").write_text(
        model_card or _default_card(config, vocab_size), encoding="utf-8"
    )
    if tokenizer_folder:
        for name in TOKENIZER_FILES:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, folder / name)


def hf_config(config: ModelConfig, vocab_size: int, pad_token_id: int) -> dict[str, Any]:
    """The content of config.json."""
    return {
        "architectures": ["BertForPreTraining"],
        "dtype": "float32",
        "pad_token_id": pad_token_id,
        "vocab_size": vocab_size,
        **COMPUTED,
        **{name: getattr(config, name) for name in SHAPE_FIELDS},
    }


def import_hf(
    folder: Path, *, allow_missing_heads: bool = False
) -> tuple[dict[str, torch.Tensor], ModelConfig, int]:
    """fp32 weights, shape, vocabulary size of a BertForPreTraining, BertForMaskedLM or BertModel.

    allow_missing_heads: accept that weights of the heads (masked language model, pooler, next
    sentence) are absent; `missing_weights` tells which. ValueError, naming every key concerned,
    where the folder is incomplete, is of another architecture or a variant of BERT that we do not
    compute, or holds other tensors than it should.
    """
    config, vocab_size = _read_config(folder)
    tensors = _normalise(_read_tensors(folder))
    problems = _take_out_tied(tensors)
    ours = parameter_shapes(config, vocab_size)
    with torch.device("meta"):
        theirs = to_hf_names({name: torch.empty(shape) for name, shape in ours.items()}, config)
    may_miss = [name for name in theirs if allow_missing_heads and name.startswith(HEADS)]
    problems += weight_problems(
        tensors, {name: value.shape for name, value in theirs.items()}, may_miss=may_miss
    )
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


def _normalise(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Today's names of BertForPreTraining for those of a bare BertModel and of old files."""
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


def _take_out_tied(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Leave the original of tied weights only, in place; returns what contradicts."""
    problems = []
    for name, original in TIED.items():
        value = tensors.pop(name, None)
        if value is not None and not torch.equal(tensors.setdefault(original, value), value):
            problems.append(f"{name} differs from {original}: they must be tied")
    return problems


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
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
    tensors = {}
    for name in files:
        try:
            tensors |= load_file(folder / name)
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged: {error}") from error
    return tensors


def _read_config(folder: Path) -> tuple[ModelConfig, int]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json")
    raw = json.loads(path.read_text(encoding="utf-8"))
    problems = [
        f"{key} is {raw[key]!r}, only {computed!r} is computed here"
        for key, computed in COMPUTED.items()
        if raw.get(key, computed) != computed
    ]
    problems += [f"{key} is missing" for key in ("model_type", "vocab_size") if key not in raw]
    architectures = raw.get("architectures") or []
    if architectures and not set(architectures) & set(ARCHITECTURES):
        problems.append(f"architectures is {architectures}, not one of {', '.join(ARCHITECTURES)}")
    if problems:
        raise ValueError(f"cannot import {path}: " + "; ".join(problems))
    # What is absent has BERT-base's value: transformers' defaults are ours.
    shape = {name: raw[name] for name in SHAPE_FIELDS if name in raw}
    return ModelConfig(**shape), raw["vocab_size"]


def _pad_token_id(tokenizer_folder: Path) -> int:
    path = tokenizer_folder / "tokenizer.json"
    for token in json.loads(path.read_text(encoding="utf-8"))["added_tokens"]:
        if token["content"] == "[PAD]":
            return token["id"]
    raise ValueError(f"{path} has no [PAD] token")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _default_card(config: ModelConfig, vocab_size: int) -> str:
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
---

BERT (Devlin et al. 2019), pretrained with masked language modelling and next sentence prediction:
{config.num_hidden_layers} layers, hidden size {config.hidden_size}, \
{config.num_attention_heads} heads, {vocab_size} tokens, \
sequences up to {config.max_position_embeddings} tokens, fp32 weights.

```python
from transformers import AutoTokenizer, BertForPreTraining

tokenizer = AutoTokenizer.from_pretrained(".")
model = BertForPreTraining.from_pretrained(".")
```
"""
