"""A model's tasks in, the class of `transformers` that has most of its heads out, and their names there.

Weights of heads that the class lacks keep our names, and lie in a file beside.
"""

from typing import NamedTuple

from model.config import Architecture, ModelConfig
from model.tasks import heads_of

NSP_FILE = "nsp_head.safetensors"  # modernbert's next sentence head
HEADS_FILE = "heads.safetensors"  # every other head that the class has no place for
ARCHITECTURE_OF: dict[str, Architecture] = {  # by config.json's model_type
    "bert": "bert", "electra": "bert", "modernbert": "modernbert",
}  # fmt: skip
CLASSES: dict[str, tuple[str, ...]] = {  # by model_type, those that we read and write
    "bert": ("BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction", "BertModel"),
    "electra": ("ElectraForPreTraining", "ElectraModel"),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertModel"),
}
MLM = {  # our module, and theirs; its decoder's weight is the word embeddings
    "mlm_head.transform": "cls.predictions.transform.dense",
    "mlm_head.layer_norm": "cls.predictions.transform.LayerNorm",
}
NSP = {"nsp_head.pooler": "bert.pooler.dense", "nsp_head.classifier": "cls.seq_relationship"}
RTD = {
    "rtd_head.dense": "discriminator_predictions.dense",
    "rtd_head.classifier": "discriminator_predictions.dense_prediction",
}
POOLERS = (  # over [CLS]: the first that there is becomes the pooler of a bare BertModel
    "sop_head.pooler", "order_head.pooler", "distance_head.pooler", "contrastive_head.dense",
)  # fmt: skip


class HfKind(NamedTuple):
    """The class that a model is exported as."""

    name: str
    model_type: str
    prefix: str  # of the encoder's names, within classes that have heads
    heads: dict[str, str]  # modules of ours that have a place there
    is_bare: bool = False  # the encoder alone, whose names have no prefix


def kind_of(config: ModelConfig) -> HfKind:
    """By its heads. BERT with a discriminator alone is ELECTRA, with embeddings as wide as the network."""
    heads = heads_of(config.tasks)
    has_mlm, has_nsp = "mlm_head" in heads, "nsp_head" in heads
    if config.architecture == "modernbert":
        name = "ModernBertForMaskedLM" if has_mlm else "ModernBertModel"
        return HfKind(name, "modernbert", "model.", {}, is_bare=not has_mlm)
    if has_mlm and has_nsp:
        return HfKind("BertForPreTraining", "bert", "bert.", MLM | NSP)
    if has_mlm:
        return HfKind("BertForMaskedLM", "bert", "bert.", MLM)
    if has_nsp:
        return HfKind("BertForNextSentencePrediction", "bert", "bert.", NSP)
    if "rtd_head" in heads:
        return HfKind("ElectraForPreTraining", "electra", "electra.", RTD)
    pooler = next((name for name in POOLERS if name.partition(".")[0] in heads), None)
    found = {pooler: "bert.pooler.dense"} if pooler else {}
    return HfKind("BertModel", "bert", "bert.", found, is_bare=True)
