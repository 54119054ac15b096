"""Features against transformers' own, and probes against other implementations of the same."""

from pathlib import Path

import pytest
import torch

import model.features
from launcher.probe_task import tokenise
from model.classifiers import choose_l2, fit_linear, nearest_labels, standardise
from model.config import ModelConfig
from model.features import encode, load_encoder
from model.hf import export_hf
from model.weights import build

TEXTS = [
    ("the river watched the long road",),
    ("a young teacher",),
    ("今天天气很好。他走进了图书馆。",),
    ("our captain carried seven small boats behind the station, before sunrise, without a word " * 4,),
    ("x",),
]  # fmt: skip
PAIRS = [(first, TEXTS[-number][0]) for number, (first,) in enumerate(TEXTS)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
@pytest.mark.parametrize("texts", [TEXTS, PAIRS], ids=["single", "pairs"])
def test_features_are_those_of_transformers(
    architecture, texts, tiny_dataset: Path, tmp_path: Path, monkeypatch
) -> None:
    """One sequence at a time there, several batches here; a text over the longest row is cut."""
    from transformers import AutoModel, AutoTokenizer

    config = ModelConfig(
        architecture=architecture,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=48,
        local_attention=8 if architecture == "modernbert" else 128,
    )
    weights = dict(build(config, 360, seed=3).named_parameters())
    spread = {name: value * 5 if value.ndim == 2 else value for name, value in weights.items()}
    export_hf(
        spread, config, 360, tmp_path, tokenizer_folder=tiny_dataset / "tokenizer", model_card=None
    )
    monkeypatch.setattr(model.features, "SLOTS_PER_BATCH", 60)
    found = encode(load_encoder(tmp_path), *tokenise(tmp_path, texts, 48))
    theirs = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for number, parts in enumerate(texts):
        given = tokenizer(*parts, truncation=True, max_length=48, return_tensors="pt")
        with torch.no_grad():
            hidden = theirs(**given).last_hidden_state[0]
        torch.testing.assert_close(found.mean[number], hidden.mean(0), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(found.cls[number], hidden[0], atol=2e-5, rtol=1e-5)


def blobs(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes that overlap in 6 features, and a feature that does not vary."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    noise = torch.randn(num, 7, generator=generator)
    centres = torch.eye(3).repeat(1, 3)[:, :7] * 1.5
    features = noise + centres[labels]
    features[:, 6] = 4.0
    return features, labels


@pytest.mark.parametrize("l2", [1.0, 0.01, 0.0001])
def test_the_linear_probe_is_logistic_regression(l2: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is the judge")
    features, labels = blobs(300, 1)
    train, _ = standardise(features, features)
    assert train[:, 6].abs().max() == 0 and train.dtype == torch.float64
    found = fit_linear(train, labels, 3, l2)
    judge = linear_model.LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-8, max_iter=5000)
    judge.fit(train.numpy(), labels.numpy())
    probabilities = torch.from_numpy(judge.predict_proba(train.numpy()))
    torch.testing.assert_close(found.logits(train).softmax(1), probabilities, atol=1e-4, rtol=0)
    assert fit_linear(train, labels, 3, l2, found).weight.sub(found.weight).abs().max() < 1e-3


def test_the_l2_that_rows_apart_like_best() -> None:
    """Labels without any sense want the strongest; classes far apart do not."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(120, 60, generator=generator, dtype=torch.float64)
    labels, order = torch.arange(120) % 2, torch.randperm(120, generator=generator)
    assert choose_l2(noise, labels, 2, order) == 1.0
    noise[:, 0] += 20 * labels
    assert choose_l2(noise, labels, 2, order) < 1.0


def test_neighbours_by_cosine_vote() -> None:
    """Against a loop; and length does not count."""
    train, labels = blobs(90, 3)
    other, _ = blobs(40, 4)
    expected = []
    for row in other:
        cosines = [float(torch.cosine_similarity(row, known, dim=0)) for known in train]
        nearest = sorted(range(90), key=lambda n, cosines=cosines: -cosines[n])[:10]
        votes = [sum(1 + cosines[n] for n in nearest if labels[n] == c) for c in range(3)]
        expected.append(votes.index(max(votes)))
    assert nearest_labels(train, labels, other, 3).tolist() == expected
    assert nearest_labels(train, labels, other * 100, 3).tolist() == expected
