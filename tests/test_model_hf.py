"""Real transformers as the judge: the same logits both ways, no key missing or unexpected."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)
from transformers import (
    BertForPreTraining as TheirBert,
)

from model.config import COMPUTE_FIELDS, MODERN_FIELDS, TASK_FIELDS, Backend, ModelConfig
from model.hf import export_hf, import_hf, missing_weights
from model.hf_names import from_hf_names, to_hf_names
from model.pretraining import ForPreTraining
from model.weights import build, load_weights

VOCAB = 70
CONFIG = ModelConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=24,
    type_vocab_size=3,
    layer_norm_eps=1e-7,
)
LENGTHS = torch.tensor([24, 9, 1, 17])  # of four rows of 24 slots


def their_config(**changes: Any) -> BertConfig:
    shape = {
        name: getattr(CONFIG, name)
        for name in vars(CONFIG)
        if name not in ("architecture", *COMPUTE_FIELDS, *MODERN_FIELDS, *TASK_FIELDS)
    }
    return BertConfig(vocab_size=VOCAB, **shape, **changes)


def randomised(model: Any) -> Any:
    """Every weight random, biases and LayerNorms too: fresh ones could be swapped unnoticed."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith(("norm.weight", "LayerNorm.weight")) else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    slots = torch.arange(24).expand(4, 24)
    return {
        "input_ids": torch.randint(VOCAB, (4, 24), generator=generator),
        "token_type_ids": torch.randint(3, (4, 24), generator=generator),
        "attention_mask": (slots < LENGTHS[:, None]).long(),
    }


def our_hidden(model: ForPreTraining) -> torch.Tensor:
    given = inputs()
    positions = torch.arange(24).expand(4, 24)
    return model.encode(
        given["input_ids"], given["token_type_ids"], positions, given["attention_mask"] - 1
    )


def weights_of(model: ForPreTraining) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def load_theirs(kind: Any, folder: Path, **options: Any) -> Any:
    model, info = kind.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def assert_same_logits(ours: ForPreTraining, theirs: Any) -> None:
    """At every filled slot; fp32, within 1e-5 of the largest logit."""
    with torch.no_grad():
        hidden, expected = our_hidden(ours), theirs(**inputs())
        filled = inputs()["attention_mask"].bool()
        pairs = [
            (ours.mlm_logits(hidden[filled]), expected.prediction_logits[filled]),
            (ours.nsp_logits(hidden[:, 0]), expected.seq_relationship_logits),
        ]
    for value, want in pairs:
        torch.testing.assert_close(value, want, rtol=0, atol=1e-5 * max(1.0, want.abs().max()))


def ours_from(folder: Path, attention: Backend = "sdpa") -> ForPreTraining:
    weights, config, vocab_size = import_hf(folder)
    model = build(replace(config, attention=attention), vocab_size, seed=9)
    load_weights(model, weights)
    return model.eval()


def export(folder: Path) -> ForPreTraining:
    model = randomised(build(CONFIG, VOCAB))
    export_hf(weights_of(model), CONFIG, VOCAB, folder, tokenizer_folder=None, model_card=None)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_loads_our_export(tmp_path: Path, attention: Backend) -> None:
    model = export(tmp_path)
    theirs = load_theirs(TheirBert, tmp_path, attn_implementation=attention)
    assert_same_logits(model, theirs)
    masked_lm = BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    encoder = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(**inputs()).prediction_logits
        torch.testing.assert_close(masked_lm(**inputs()).logits, expected)
        filled = inputs()["attention_mask"].bool()
        hidden = encoder(**inputs()).last_hidden_state
        torch.testing.assert_close(our_hidden(model)[filled], hidden[filled], rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_we_load_theirs(tmp_path: Path, attention: Backend) -> None:
    theirs = randomised(TheirBert(their_config()))
    theirs.save_pretrained(tmp_path)
    ours = ours_from(tmp_path, attention)
    assert_same_logits(ours, theirs)
    assert ours.config == replace(CONFIG, attention=attention)


def test_losses_and_gradients_equal_theirs(tmp_path: Path) -> None:
    """Of both objectives together, in training mode without dropout."""
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    theirs = randomised(TheirBert(their_config()))
    theirs.config.update(changes)
    theirs.save_pretrained(tmp_path)
    theirs = load_theirs(TheirBert, tmp_path).train()
    ours = ours_from(tmp_path).train()
    given, cls = inputs(), torch.arange(4) * 24
    index = torch.tensor([1, 5, 23, 25, 30, 73])
    labels = torch.full((4 * 24,), -100)
    labels[index] = torch.tensor([3, 8, 69, 0, 8, 11])
    next_sentence = torch.tensor([0, 1, 1, 0])
    output = theirs(**given, labels=labels.view(4, 24), next_sentence_label=next_sentence)
    output.loss.backward()
    losses = ours(
        given["input_ids"],
        given["token_type_ids"],
        torch.arange(24).expand(4, 24),
        given["attention_mask"] - 1,
        targets={"mlm": (index, labels[index]), "nsp": (cls, next_sentence)},
    )
    loss = torch.stack([each.loss_sum / each.count for each in losses.values()]).sum()
    loss.backward()
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-6)
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    renamed = to_hf_names(gradients, CONFIG)
    assert renamed.keys() == expected.keys() - {"cls.predictions.decoder.bias"}
    # transformers keeps the padding token's own row out of the input gradient, as we do.
    for name, gradient in renamed.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_names_round_trip_exactly() -> None:
    weights = weights_of(randomised(build(CONFIG, VOCAB)))
    returned = from_hf_names(to_hf_names(weights, CONFIG), CONFIG)
    assert returned.keys() == weights.keys()
    assert all(torch.equal(returned[name], value) for name, value in weights.items())


def test_export_import_is_exact(tmp_path: Path) -> None:
    weights = weights_of(export(tmp_path))
    imported, config, vocab_size = import_hf(tmp_path)
    assert (config, vocab_size) == (CONFIG, VOCAB)
    assert list(imported) == list(weights)
    assert all(torch.equal(imported[name], value) for name, value in weights.items())


def test_exported_files(tmp_path: Path) -> None:
    tokenizer, folder = tmp_path / "tokenizer", tmp_path / "hf"
    tokenizer.mkdir()
    content = {"added_tokens": [{"id": 0, "content": "[UNK]"}, {"id": 5, "content": "[PAD]"}]}
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    (tokenizer / "sentencepiece.model").write_bytes(b"pieces")
    (tokenizer / "notes.txt").write_text("not a tokenizer file")
    half = weights_of(build(CONFIG, VOCAB).bfloat16())
    export_hf(half, CONFIG, VOCAB, folder, tokenizer_folder=tokenizer, model_card="# Ours\n")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "model.safetensors", "config.json", "README.md", "tokenizer.json", "sentencepiece.model",
    }  # fmt: skip
    assert (folder / "README.md").read_text() == "# Ours\n"
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 5
    stored = load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        export_hf(half, CONFIG, VOCAB, folder, tokenizer_folder=tmp_path, model_card=None)


def test_export_refuses_by_name_and_writes_nothing(tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in weights_of(build(CONFIG, VOCAB)).items()}
    weights["layers.1.qkv.bias"][:2] = torch.tensor([float("nan"), float("inf")])
    del weights["nsp_head.classifier.bias"]
    with pytest.raises(ValueError) as error:
        export_hf(weights, CONFIG, VOCAB, tmp_path / "hf", tokenizer_folder=None, model_card=None)
    assert "layers.1.qkv.bias has 2 NaN or infinite values" in str(error.value)
    assert "nsp_head.classifier.bias is missing" in str(error.value)
    assert not (tmp_path / "hf").exists()


NO_NSP = [
    "nsp_head.pooler.weight",
    "nsp_head.pooler.bias",
    "nsp_head.classifier.weight",
    "nsp_head.classifier.bias",
]
NO_MLM = [
    "mlm_head.transform.weight",
    "mlm_head.transform.bias",
    "mlm_head.layer_norm.weight",
    "mlm_head.layer_norm.bias",
    "mlm_head.decoder.bias",
]


@pytest.mark.parametrize(
    ("kind", "options", "missing"),
    [
        (BertForMaskedLM, {}, NO_NSP),
        (BertModel, {}, [*NO_MLM, *NO_NSP[2:]]),
        (BertModel, {"add_pooling_layer": False}, [*NO_MLM, *NO_NSP]),
    ],
)
def test_models_without_some_heads(
    tmp_path: Path, kind: Any, options: dict[str, bool], missing: list[str]
) -> None:
    theirs = randomised(kind(their_config(), **options))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cls\.seq_relationship\.weight is missing"):
        import_hf(tmp_path)
    weights, config, vocab_size = import_hf(tmp_path, allow_missing_heads=True)
    assert missing_weights(weights, config, vocab_size) == missing
    ours = build(config, vocab_size).eval()
    load_weights(ours, weights, may_miss=missing)
    encoder = theirs if kind is BertModel else theirs.bert
    filled = inputs()["attention_mask"].bool()
    with torch.no_grad():
        expected = encoder(**inputs()).last_hidden_state[filled]
        torch.testing.assert_close(our_hidden(ours)[filled], expected, rtol=0, atol=2e-5)


def test_old_names_duplicates_and_shards(tmp_path: Path) -> None:
    """As older libraries wrote: gamma and beta, position_ids, tied copies, in two files."""
    weights = weights_of(export(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = tensors[
        "bert.embeddings.word_embeddings.weight"
    ].clone()
    tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
    tensors["bert.embeddings.position_ids"] = torch.arange(24)[None]
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in tensors.items()
    }
    (tmp_path / "model.safetensors").unlink()
    shards = {"one.safetensors": sorted(old)[::2], "two.safetensors": sorted(old)[1::2]}
    for file, names in shards.items():
        save_file({name: old[name] for name in names}, tmp_path / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    imported, _, _ = import_hf(tmp_path)
    assert all(torch.equal(imported[name], value) for name, value in weights.items())
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks two\.safetensors"):
        import_hf(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "roberta", "model_type is 'roberta', not one of bert, electra, modernbert"),
        ("hidden_act", "gelu_new", "hidden_act is 'gelu_new', only 'gelu'"),
        ("position_embedding_type", "relative_key", "position_embedding_type is 'relative_key'"),
        ("architectures", ["BertLMHeadModel"], r"architectures is \['BertLMHeadModel'\]"),
        ("tie_word_embeddings", False, "tie_word_embeddings is False"),
        ("vocab_size", 71, r"word_embeddings.weight has shape \[70, 32\] instead of \[71, 32\]"),
        ("intermediate_size", 49, r"layer.2.output.dense.weight has shape \[32, 48\]"),
        ("num_hidden_layers", 4, "bert.encoder.layer.3.attention.self.query.weight is missing"),
        ("num_hidden_layers", 2, "bert.encoder.layer.2.attention.self.key.bias is unknown"),
        ("hidden_size", 30, "hidden_size 30 is not a multiple of num_attention_heads 4"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    export(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        import_hf(tmp_path)


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    BertForSequenceClassification(their_config()).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("BertForSequenceClassification", "BertModel"))
    with pytest.raises(ValueError, match=r"classifier\.weight is unknown"):
        import_hf(tmp_path, allow_missing_heads=True)
    export(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = torch.zeros(VOCAB, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.weight differs from .*word_embeddings"):
        import_hf(tmp_path)


def test_unreadable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        import_hf(tmp_path)
    export(tmp_path)
    stored = tmp_path / "model.safetensors"
    stored.write_bytes(stored.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        import_hf(tmp_path)
    stored.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not read, for unpickling can run"):
        import_hf(tmp_path)
