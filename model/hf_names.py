"""Our weights' names and shape's fields, beside those of `transformers`, for each architecture."""

from collections.abc import Iterator, Mapping

import torch

from model.config import ModelConfig
from model.hf_kinds import kind_of
from model.tasks import heads_of

# Our module, and its Hugging Face name. {} is the layer.
BERT_MODULES = {
    "embeddings.word_embeddings": "bert.embeddings.word_embeddings",
    "embeddings.position_embeddings": "bert.embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "bert.embeddings.token_type_embeddings",
    "embeddings.layer_norm": "bert.embeddings.LayerNorm",
}
BERT_LAYER = {
    "layers.{}.attention_output": "bert.encoder.layer.{}.attention.output.dense",
    "layers.{}.attention_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
    "layers.{}.intermediate": "bert.encoder.layer.{}.intermediate.dense",
    "layers.{}.output": "bert.encoder.layer.{}.output.dense",
    "layers.{}.output_norm": "bert.encoder.layer.{}.output.LayerNorm",
}
QKV = "layers.{}.qkv"  # one projection of ours, query over key over value, is three of BERT's
QKV_PARTS = tuple(
    f"bert.encoder.layer.{{}}.attention.self.{part}" for part in ("query", "key", "value")
)
MODERN_WEIGHTS = {
    "embeddings.word_embeddings.weight": "model.embeddings.tok_embeddings.weight",
    "embeddings.layer_norm.weight": "model.embeddings.norm.weight",
    "final_norm.weight": "model.final_norm.weight",
    "mlm_head.transform.weight": "head.dense.weight",
    "mlm_head.layer_norm.weight": "head.norm.weight",
    "mlm_head.decoder.bias": "decoder.bias",
}
MODERN_LAYER = {
    "attention_norm": "attn_norm",
    "qkv": "attn.Wqkv",
    "attention_output": "attn.Wo",
    "output_norm": "mlp_norm",
    "intermediate": "mlp.Wi",
    "output": "mlp.Wo",
}


def to_hf_names(
    weights: Mapping[str, torch.Tensor], config: ModelConfig
) -> dict[str, torch.Tensor]:
    """Our names to Hugging Face's, without copying; BERT's fused projections become views of three.

    Weights of heads that the class lacks keep their names (`is_apart`).
    """
    renamed, placed = {}, set()
    for ours, theirs in _name_pairs(config):
        if ours in weights:
            parts = weights[ours].chunk(len(theirs)) if len(theirs) > 1 else (weights[ours],)
            renamed.update(zip(theirs, parts, strict=True))
            placed.add(ours)
    kept = (name for name in weights if name not in placed and is_apart(name, config))
    return renamed | {name: weights[name] for name in kept}


def is_apart(name: str, config: ModelConfig) -> bool:
    """Whether a name is ours, of a head: it has no place in the class of transformers."""
    return name.startswith(tuple(f"{head}." for head in heads_of(config.tasks)))


def from_hf_names(
    weights: Mapping[str, torch.Tensor], config: ModelConfig
) -> dict[str, torch.Tensor]:
    """Hugging Face's names to ours; incomplete and unknown weights are left out."""
    renamed = {}
    for ours, theirs in _name_pairs(config):
        if all(name in weights for name in theirs):
            parts = [weights[name] for name in theirs]
            renamed[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    kept = (name for name in weights if name not in renamed and is_apart(name, config))
    return renamed | {name: weights[name] for name in kept}


def _name_pairs(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each weight's name here, and its name, or its parts' names, there."""
    if config.architecture == "modernbert":
        yield from ((ours, (theirs,)) for ours, theirs in MODERN_WEIGHTS.items())
        for layer in range(config.num_hidden_layers):
            for ours, theirs in MODERN_LAYER.items():
                if layer or ours != "attention_norm":
                    yield (
                        f"layers.{layer}.{ours}.weight",
                        (f"model.layers.{layer}.{theirs}.weight",),
                    )
        return
    kind = kind_of(config)
    modules: dict[str, tuple[str, ...]] = {
        ours: (theirs,) for ours, theirs in {**BERT_MODULES, **kind.heads}.items()
    }
    for layer in range(config.num_hidden_layers):
        modules[QKV.format(layer)] = tuple(part.format(layer) for part in QKV_PARTS)
        for ours, theirs in BERT_LAYER.items():
            modules[ours.format(layer)] = (theirs.format(layer),)
    if "mlm_head.transform" in modules:
        yield "mlm_head.decoder.bias", ("cls.predictions.bias",)
    for ours, theirs in modules.items():
        names = tuple(_with_prefix(name, kind.prefix) for name in theirs)
        yield f"{ours}.weight", tuple(f"{name}.weight" for name in names)
        if not ours.endswith("_embeddings"):
            yield f"{ours}.bias", tuple(f"{name}.bias" for name in names)


def _with_prefix(name: str, prefix: str) -> str:
    """ELECTRA's encoder is BERT's under another name."""
    return prefix + name.removeprefix("bert.") if name.startswith("bert.") else name
