"""ModernBERT: real transformers as the judge, packing, windows, both heads, weights both ways."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_model_bert import (
    BATCH,
    assert_same,
    assert_same_losses,
    gradients_of,
    packed_batch,
    with_labels_of,
)
from test_model_hf import inputs, load_theirs, our_hidden, randomised, weights_of
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel

from model.config import Backend, ModelConfig
from model.hf import export_hf, import_hf, missing_weights
from model.hf_classes import export_class
from model.hf_names import to_hf_names
from model.pretraining import ForPreTraining
from model.weights import build, fresh_weights, load_weights

VOCAB = 70
CONFIG = ModelConfig(
    architecture="modernbert",
    hidden_size=32,
    num_hidden_layers=5,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=24,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    layer_norm_eps=1e-5,
    global_attention_every=2,
    local_attention=6,
    global_rope_theta=5000.0,
    local_rope_theta=300.0,
)
BACKENDS: tuple[Backend, ...] = ("grouped", "sdpa", "eager")


def export(folder: Path) -> ForPreTraining:
    model = randomised(build(CONFIG, VOCAB))
    export_hf(weights_of(model), CONFIG, VOCAB, folder, tokenizer_folder=None, model_card=None)
    return model


def ours_from(folder: Path, attention: Backend = "grouped") -> ForPreTraining:
    weights, config, vocab_size = import_hf(folder, allow_missing_heads=True)
    model = build(replace(config, attention=attention), vocab_size, seed=9)
    load_weights(model, weights, may_miss=missing_weights(weights, config, vocab_size))
    return model.eval()


def their_config(**changes: Any) -> ModernBertConfig:
    return ModernBertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=24,
        local_attention=6,
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
        **changes,
    )


def their_inputs() -> dict[str, torch.Tensor]:
    given = inputs()
    return {name: given[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("attention", BACKENDS)
def test_transformers_loads_our_export(tmp_path: Path, attention: Backend) -> None:
    """Every key is there and none is unknown; the same logits at every token, fp32, within 1e-5."""
    model = export(tmp_path)
    theirs = load_theirs(ModernBertForMaskedLM, tmp_path, attn_implementation="sdpa")
    ours = ours_from(tmp_path, attention)
    assert weights_of(ours).keys() == weights_of(model).keys()
    filled = inputs()["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**their_inputs()).logits[filled]
        value = ours.mlm_logits(our_hidden(ours)[filled])
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("every", [1, 3])
def test_we_load_theirs(tmp_path: Path, attention: Backend, every: int) -> None:
    theirs = randomised(ModernBertForMaskedLM(their_config(global_attn_every_n_layers=every)))
    theirs.save_pretrained(tmp_path)
    ours = ours_from(tmp_path, attention)
    assert ours.config.global_attention_every == every
    filled = inputs()["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**their_inputs()).logits[filled]
        value = ours.mlm_logits(our_hidden(ours)[filled])
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize(
    ("dtype", "loss_bound", "bound"), [("fp32", 1e-6, 1e-4), ("bf16", 1e-2, 0.04)]
)
def test_loss_and_gradients_equal_theirs(
    tmp_path: Path, dtype: str, loss_bound: float, bound: float
) -> None:
    """fp32: every gradient within 1e-4 of its largest value; bf16: within 4 % of the norm."""
    theirs = randomised(ModernBertForMaskedLM(their_config()))
    theirs.save_pretrained(tmp_path)
    ours = ours_from(tmp_path).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    given = inputs()
    index = torch.tensor([1, 5, 23, 25, 30, 73])
    labels = torch.full((4 * 24,), -100)
    labels[index] = torch.tensor([3, 8, 69, 0, 8, 11])
    output = theirs(**their_inputs(), labels=labels.view(4, 24))
    output.loss.backward()
    none = torch.empty(0, dtype=torch.int64)
    losses = ours(
        given["input_ids"],
        given["token_type_ids"],
        torch.arange(24).expand(4, 24),
        given["attention_mask"] - 1,
        targets={"mlm": (index, labels[index]), "nsp": (none, none)},
    )
    (losses["mlm"].loss_sum / 6).backward()
    assert losses["mlm"].loss_sum.item() / 6 == pytest.approx(output.loss.item(), rel=loss_bound)
    gradients = {name: p.grad.float() for name, p in ours.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    renamed = to_hf_names(gradients, ours.config)
    assert renamed.keys() - expected.keys() == {n for n in renamed if n.startswith("nsp_head")}
    for name, want in expected.items():
        if dtype == "fp32":
            limit = bound * want.abs().max().item()
            torch.testing.assert_close(renamed[name], want, rtol=0, atol=limit, msg=name)
    errors = torch.cat([(renamed[name] - want).flatten() for name, want in expected.items()])
    norm = torch.cat([want.flatten() for want in expected.values()]).norm()
    assert errors.norm() < bound * norm


@pytest.mark.parametrize("attention", BACKENDS)
def test_packed_rows_equal_one_sequence_per_row(attention: Backend) -> None:
    lengths = [[9, 7, 4], [24], [5, 13], [3]]
    alone = packed_batch([[length] for row in lengths for length in row], row_length=24)
    alone = with_labels_of(alone, BATCH)
    model = randomised(build(replace(CONFIG, attention=attention), VOCAB))
    packed_losses, alone_losses = model(**BATCH), model(**alone)
    assert_same_losses(packed_losses, alone_losses, rtol=1e-5)
    packed, separate = gradients_of(model, packed_losses), gradients_of(model, alone_losses)
    assert_same({n: g / packed[n].abs().max() for n, g in packed.items()},
                {n: g / packed[n].abs().max() for n, g in separate.items()})  # fmt: skip


def test_both_heads_come_back_and_the_bare_encoder_loads(tmp_path: Path) -> None:
    model = export(tmp_path / "whole")
    weights, config, vocab_size = import_hf(tmp_path / "whole")
    assert (config, vocab_size) == (CONFIG, VOCAB)
    assert all(torch.equal(weights[name], value) for name, value in weights_of(model).items())
    assert export_class(tmp_path / "whole", tmp_path / "bare", "encoder") == "ModernBertModel"
    bare = load_theirs(ModernBertModel, tmp_path / "bare")
    filled = inputs()["attention_mask"].bool()
    with torch.no_grad():
        expected = bare(**their_inputs()).last_hidden_state[filled]
        value = our_hidden(model)[filled]
    torch.testing.assert_close(value, expected, rtol=0, atol=2e-5 * expected.abs().max())
    weights, config, _ = import_hf(tmp_path / "bare", allow_missing_heads=True)
    assert all(
        name.startswith(("mlm_head", "nsp_head"))
        for name in missing_weights(weights, config, VOCAB)
    )
    with pytest.raises(
        ValueError, match=r"modernbert has no pretraining class: take one of masked-lm"
    ):
        export_class(tmp_path / "whole", tmp_path / "other", "pretraining")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("norm_bias", True, "norm_bias is True, only False"),
        ("layer_types", ["full_attention"] * 2 + ["sliding_attention"] * 3, "layer_types is"),
        (
            "rope_parameters",
            {"full_attention": {"rope_type": "yarn", "rope_theta": 1.0}},
            "rope_type of full_attention is 'yarn'",
        ),
        ("intermediate_size", 41, r"layers.0.mlp.Wi.weight has shape \[80, 32\]"),
    ],
)
def test_variants_are_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    export(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        import_hf(tmp_path)


def test_initialisation_has_the_spread_of_theirs() -> None:
    """Standard deviation of every matrix, within 10 % of a fresh model of transformers."""
    theirs = ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=500, hidden_size=256, intermediate_size=300, num_hidden_layers=4,
            num_attention_heads=4, pad_token_id=0, cls_token_id=2, sep_token_id=3,
            bos_token_id=2, eos_token_id=3,
        )
    )  # fmt: skip
    config = replace(
        CONFIG,
        hidden_size=256,
        intermediate_size=300,
        num_hidden_layers=4,
        global_attention_every=3,
    )
    ours = to_hf_names(dict(fresh_weights(config, 500, seed=1)), config)
    for name, value in theirs.named_parameters():
        if value.ndim == 2:
            assert ours[name].std().item() == pytest.approx(value.std().item(), rel=0.1), name
        else:
            assert torch.equal(ours[name], value), name
