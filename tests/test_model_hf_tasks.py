"""Models of any tasks: transformers' class for heads that it knows, a file beside for others, and back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model_hf import inputs, load_theirs, our_hidden, randomised, weights_of
from transformers import ElectraConfig, ElectraForPreTraining

from model.config import ModelConfig
from model.hf import export_hf, import_hf, missing_weights
from model.hf_classes import export_class
from model.hf_kinds import HEADS_FILE, NSP_FILE, kind_of
from model.hf_parity import compare_logits, compare_weights
from model.pretraining import ForPreTraining
from model.tasks import TASKS
from model.weights import build

VOCAB = 70
BERT = ModelConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=24, type_vocab_size=3, generator_divisor=2,
)  # fmt: skip
MODERN = replace(
    BERT, architecture="modernbert", type_vocab_size=2, local_attention=6, layer_norm_eps=1e-5
)
RTD = ("rtd_generator", "rtd")
CASES = (  # configuration, tasks, class, files beside
    (BERT, ("mlm", "nsp"), "BertForPreTraining", set()),
    (BERT, tuple(TASKS), "BertForPreTraining", {HEADS_FILE}),
    (BERT, ("wwm", "span"), "BertForMaskedLM", set()),
    (BERT, ("clm", "sop", "rtd_generator", "rtd"), "BertForMaskedLM", {HEADS_FILE}),
    (BERT, ("nsp",), "BertForNextSentencePrediction", set()),
    (BERT, RTD, "ElectraForPreTraining", {HEADS_FILE}),
    (BERT, (*RTD, "order"), "ElectraForPreTraining", {HEADS_FILE}),
    (BERT, ("sop", "reorder"), "BertModel", {HEADS_FILE}),
    (BERT, ("contrastive",), "BertModel", set()),
    (BERT, ("reorder", "relative"), "BertModel", {HEADS_FILE}),
    (MODERN, ("mlm", "nsp"), "ModernBertForMaskedLM", {NSP_FILE}),
    (MODERN, ("prefix_lm", "nsp", "cpc"), "ModernBertForMaskedLM", {NSP_FILE, HEADS_FILE}),
    (MODERN, RTD, "ModernBertModel", {HEADS_FILE}),
)


def export(config: ModelConfig, folder: Path) -> ForPreTraining:
    model = randomised(build(config, VOCAB))
    export_hf(weights_of(model), config, VOCAB, folder, tokenizer_folder=None, model_card=None)
    return model


@pytest.mark.parametrize(
    ("config", "tasks", "hf_class", "beside"),
    CASES,
    ids=[f"{c[0].architecture}-{c[2]}-{'-'.join(c[1][:3])}" for c in CASES],
)
def test_the_class_loads_and_every_weight_comes_back(
    tmp_path: Path, config: ModelConfig, tasks: tuple[str, ...], hf_class: str, beside: set[str]
) -> None:
    """No key missing or unexpected; the same logits, or hidden states, at every token within 1e-5, fp32."""
    config = replace(config, tasks=tasks)
    model = export(config, tmp_path)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"model.safetensors", *beside}
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == [hf_class] and ("cloze" in content) == (
        tasks != ("mlm", "nsp")
    )
    options = {"add_pooling_layer": False} if tasks == ("reorder", "relative") else {}
    theirs = load_theirs(getattr(transformers, hf_class), tmp_path, **options)
    given = inputs()
    if config.architecture == "modernbert":
        del given["token_type_ids"]
    filled = given["attention_mask"].bool()
    with torch.no_grad():
        hidden, output = our_hidden(model), theirs(**given)
        if hf_class.endswith("Model"):
            value, want = hidden[filled], output.last_hidden_state[filled]
        elif hf_class == "BertForNextSentencePrediction":
            value, want = model.nsp_logits(hidden[:, 0]), output.logits
        elif hf_class == "ElectraForPreTraining":
            value, want = model.rtd_head(hidden)[filled], output.logits[filled]
        else:
            logits = (
                output.prediction_logits
                if "nsp" in tasks and config == replace(BERT, tasks=tasks)
                else output.logits
            )
            value, want = model.mlm_logits(hidden[filled]), logits[filled]
    torch.testing.assert_close(value, want, rtol=0, atol=1e-5 * max(1.0, want.abs().max()))
    weights, found, vocab_size = import_hf(tmp_path)
    divisor = config.generator_divisor  # is told where there are other tasks than the default ones
    assert (replace(found, generator_divisor=divisor), vocab_size) == (config, VOCAB)
    assert found == config or tasks == ("mlm", "nsp")
    assert list(weights) == list(weights_of(model))
    compare_weights(tmp_path, weights_of(model), config)
    assert compare_logits(tmp_path)["class"] == hf_class
    assert export_class(tmp_path, tmp_path / "alone") == hf_class
    load_theirs(getattr(transformers, hf_class), tmp_path / "alone", **options)


def test_a_pooler_over_cls_becomes_that_of_a_bare_model(tmp_path: Path) -> None:
    model = export(replace(BERT, tasks=("sop",)), tmp_path)
    theirs = load_theirs(transformers.BertModel, tmp_path)
    with torch.no_grad():
        logits = model.get_submodule("sop_head")(our_hidden(model)[:, 0])
        pooled = theirs(**inputs()).pooler_output
        value = model.get_submodule("sop_head.classifier")(pooled)
    torch.testing.assert_close(value, logits, rtol=0, atol=1e-5)


def test_a_kind_that_was_not_trained_is_refused(tmp_path: Path) -> None:
    export(replace(BERT, tasks=("mlm", "sop")), tmp_path / "whole")
    with pytest.raises(ValueError, match=r"BertForPreTraining needs: no cls\.seq_relationship"):
        export_class(tmp_path / "whole", tmp_path / "other", "pretraining")
    assert export_class(tmp_path / "whole", tmp_path / "bare", "encoder") == "BertModel"
    load_theirs(transformers.BertModel, tmp_path / "bare", add_pooling_layer=False)


def test_a_discriminator_of_others_begins_a_run(tmp_path: Path) -> None:
    """Encoder and head come; the generator, which is not there, is missing. Narrow embeddings are refused."""
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 24,
    }  # fmt: skip
    theirs = randomised(ElectraForPreTraining(ElectraConfig(embedding_size=32, **shape)))
    theirs.save_pretrained(tmp_path / "electra")
    with pytest.raises(ValueError, match=r"generator\.projection\.weight is missing"):
        import_hf(tmp_path / "electra")
    weights, config, _ = import_hf(tmp_path / "electra", allow_missing_heads=True)
    wanted = replace(config, tasks=("mlm", *RTD), generator_divisor=2)
    missing = missing_weights(weights, wanted, VOCAB)
    assert {name.partition(".")[0] for name in missing} == {"mlm_head", "generator"}
    assert torch.equal(
        weights["rtd_head.dense.weight"], theirs.discriminator_predictions.dense.weight
    )
    narrow = ElectraForPreTraining(ElectraConfig(embedding_size=16, **shape))
    narrow.save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="embedding_size is 16, only hidden_size, 32"):
        import_hf(tmp_path / "narrow")


def test_damaged_heads_are_refused(tmp_path: Path) -> None:
    export(replace(BERT, tasks=("mlm", "sop")), tmp_path)
    path = tmp_path / HEADS_FILE
    heads = load_file(path)
    del heads["sop_head.classifier.bias"]
    heads["order_head.pooler.bias"] = torch.zeros(32)
    save_file(heads, path)
    with pytest.raises(
        ValueError, match=r"sop_head\.classifier\.bias is missing; order_head"
    ) as error:
        import_hf(tmp_path)
    assert "order_head.pooler.bias is unknown" in str(error.value)
    config = tmp_path / "config.json"
    for wrong, message in (
        ({"tasks": "mlm"}, "cloze names no tasks"),
        ({"tasks": [f"task{n}" for n in range(99)]}, "cloze names 99 tasks, there are 19"),
        ({"tasks": ["mlm", "nso"], "generator_divisor": 4}, "task 'nso' is not one of"),
        ({"tasks": ["mlm"], "generator_divisor": "4"}, "generator_divisor cannot be '4'"),
    ):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"cloze": wrong}))
        with pytest.raises(ValueError, match=message):
            import_hf(tmp_path)


def test_the_card_says_that_rows_were_causal(tmp_path: Path) -> None:
    config = replace(BERT, tasks=("mlm", "clm", "denoise"))
    export(config, tmp_path / "ours")
    text = (tmp_path / "ours" / "README.md").read_text()
    assert "(clm, denoise)" in text and "BertForMaskedLM" in text
    weights, _, _ = import_hf(tmp_path / "ours")
    for card, folder in (("# Mine\n", "mine"), (text + "More.\n", "again")):
        export_hf(weights, config, VOCAB, tmp_path / folder, tokenizer_folder=None, model_card=card)
        assert (tmp_path / folder / "README.md").read_text().count("## Causal rows") == 1
    assert kind_of(config).name == "BertForMaskedLM"
