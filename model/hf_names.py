"""Our weights' names and shape's fields, beside those of `transformers`, for each architecture."""

from collections.abc import Iterator, Mapping

import torch

from model.config import ModelConfig

# Our module, and its Hugging Face name. {} is the layer.
BERT_MODULES = {
    "embeddings.word_embeddings": "bert.embeddings.word_embeddings",
    "embeddings.position_embeddings": "bert.embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "bert.embeddings.token_type_embeddings",
    "embeddings.layer_norm": "bert.embeddings.LayerNorm",
    "mlm_head.transform": "cls.predictions.transform.dense",
    "mlm_head.layer_norm": "cls.predictions.transform.LayerNorm",
    "nsp_head.pooler": "bert.pooler.dense",
    "nsp_head.classifier": "cls.seq_relationship",
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
    # transformers has no such head: these go into a file of their own
    "nsp_head.pooler.weight": "nsp_head.pooler.weight",
    "nsp_head.pooler.bias": "nsp_head.pooler.bias",
    "nsp_head.classifier.weight": "nsp_head.classifier.weight",
    "nsp_head.classifier.bias": "nsp_head.classifier.bias",
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
    """Our names to Hugging Face's, without copying; BERT's fused projections become views of three."""
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
    modules: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in BERT_MODULES.items()}
    for layer in range(config.num_hidden_layers):
        modules[QKV.format(layer)] = tuple(part.format(layer) for part in QKV_PARTS)
        for ours, theirs in BERT_LAYER.items():
            modules[ours.format(layer)] = (theirs.format(layer),)
    yield "mlm_head.decoder.bias", ("cls.predictions.bias",)  # its weight is the word embeddings
    for ours, theirs in modules.items():
        yield f"{ours}.weight", tuple(f"{name}.weight" for name in theirs)
        if not ours.endswith("_embeddings"):
            yield f"{ours}.bias", tuple(f"{name}.bias" for name in theirs)
