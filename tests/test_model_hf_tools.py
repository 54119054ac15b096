"""Hugging Face's own tools as the judge: what they make of our folders is what our model computes.

fill-mask, Trainer, sentence-transformers, ONNX; for both architectures, after a short real training.
"""

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support import document
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from data.batch import Reader, build_loader
from data.collate import Batch
from data.lanes import DataConfig, StreamState
from data.prepare import PrepareConfig, prepare
from data.shards import Dataset
from launcher.cli import main
from model.config import Architecture, ModelConfig
from model.hf import export_hf
from model.hf_tokenizer import copy_tokenizer
from model.pretraining import ForPreTraining
from model.weights import build
from trainer.checkpoint_files import FORMAT
from trainer.files import sha256_of

LONGEST = 64
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": LONGEST,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
CONFIGS: dict[Architecture, ModelConfig] = {
    "bert": ModelConfig(**SHAPE),
    "modernbert": ModelConfig(
        architecture="modernbert", global_attention_every=2, local_attention=8, **SHAPE
    ),
}
CLASSES = {
    ("bert", "encoder"): "BertModel",
    ("bert", "masked-lm"): "BertForMaskedLM",
    ("modernbert", "encoder"): "ModernBertModel",
    ("modernbert", "masked-lm"): "ModernBertForMaskedLM",
}
TEXTS = [document(number) for number in (1, 2, 3, 7)]  # of several lengths, all over the longest
SENTENCES = [
    "The red fox.",
    "Our captain repaired the old clock near the harbour.",
    "今天天气很好。",
]
EXPORTERS = ("onnx", "onnxscript", "onnxruntime")


class Trained(NamedTuple):
    model: ForPreTraining
    folder: Path  # as in a checkpoint's hf/
    batch: Batch  # that was not trained on


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share out: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """300 documents of one to four sentences: several share a row."""
    folder = tmp_path_factory.mktemp("short")
    texts = [". ".join(document(n).split(". ")[: 1 + n % 4]) for n in range(300)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = PrepareConfig(
        output=str(folder / "dataset"),
        sources={"text": (str(folder / "text.jsonl"),)},
        vocab_size=360,
        heldout_fraction=0.05,
        block_tokens=4096,
        num_processes=1,
    )
    return Dataset.open(prepare(config))


@pytest.fixture(scope="module", params=list(CONFIGS))
def trained(
    request: pytest.FixtureRequest, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """A tiny model after 60 steps, so that no weight is what it was drawn as."""
    config, vocab_size = CONFIGS[request.param], dataset.vocab_size
    model = build(config, vocab_size, dataset.special_ids["[PAD]"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batches = read_batches(dataset)
    for batch in itertools.islice(batches, 60):
        losses = model(**batch.model_inputs(torch.device("cpu")))
        loss = torch.stack([each.loss_sum / each.count for each in losses.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    weights = {name: value.detach() for name, value in model.named_parameters()}
    tokenizer = dataset.root / "tokenizer"
    export_hf(weights, config, vocab_size, folder, tokenizer_folder=tokenizer, model_card=None)
    return Trained(model.eval(), folder, next(batches))


def read_batches(dataset: Dataset) -> Iterator[Batch]:
    config = DataConfig(path=str(dataset.root), sequence_length=LONGEST, num_lanes=16)
    reader = Reader(rank=0, world_size=1, micro_batch_size=8, global_batch_size=8, seed=5)
    state = StreamState.start(config.num_lanes, num_sources=1)
    return (item.batch for item in build_loader(config, reader, state))


@torch.no_grad()
def our_hidden(model: ForPreTraining, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of single texts: int64 [B, L] twice -> [B, L, D]."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return model.encode(ids, torch.zeros_like(ids), positions, mask.int() - 1)


def load(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def test_fill_mask_ranks_as_our_logits_do(trained: Trained) -> None:
    fill = pipeline("fill-mask", model=str(trained.folder), device="cpu")
    text = "Our captain [MASK] the old clock."
    answers: Any = fill(text, top_k=trained.model.vocab_size)
    tokenizer: Any = fill.tokenizer
    given = tokenizer(text, return_tensors="pt")
    ids, mask = given["input_ids"], given["attention_mask"]
    hidden = our_hidden(trained.model, ids, mask)[ids == tokenizer.mask_token_id]
    with torch.no_grad():
        scores = trained.model.mlm_logits(hidden)[0].softmax(-1)
    ranked = torch.tensor([answer["token"] for answer in answers])
    theirs = torch.tensor([answer["score"] for answer in answers])
    assert len(set(ranked.tolist())) == trained.model.vocab_size and theirs.isfinite().all()
    assert ranked[:10].tolist() == scores.topk(10).indices.tolist()
    torch.testing.assert_close(scores[ranked], theirs, rtol=1e-4, atol=1e-8)


def test_tools_cut_texts_at_the_longest_row(trained: Trained) -> None:
    """With nothing but truncation=True: the tokenizer knows the model's length and its inputs."""
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    given = tokenizer(TEXTS, truncation=True, padding=True, return_tensors="pt")
    types = {"token_type_ids"} if trained.model.config.architecture == "bert" else set()
    assert given.keys() == {"input_ids", "attention_mask"} | types
    assert given["input_ids"].shape == (len(TEXTS), LONGEST)
    extract = pipeline("feature-extraction", model=str(trained.folder), device="cpu")
    (features,) = extract(TEXTS[0], truncation=True)
    hidden = our_hidden(trained.model, given["input_ids"][:1], given["attention_mask"][:1])
    torch.testing.assert_close(torch.tensor(features), hidden[0], rtol=0, atol=1e-5)


def test_tokenizer_that_fits_is_copied_as_it_is(dataset: Dataset, tmp_path: Path) -> None:
    """BERT-base: every file byte for byte, so the digest stays."""
    source = dataset.root / "tokenizer"
    copy_tokenizer(source, tmp_path, ModelConfig())
    names = sorted(path.name for path in source.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all((tmp_path / name).read_bytes() == (source / name).read_bytes() for name in names)


class Labelled(torch.utils.data.Dataset):
    """Sentences, and whether they are of a fox."""

    def __init__(self, tokenizer: Any) -> None:
        texts = [line for number in range(1, 7) for line in document(number).split(". ")]
        self.rows = [{**tokenizer(text), "labels": int("fox" in text)} for text in texts]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def test_trainer_fine_tunes_and_saves(trained: Trained, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    rows = Labelled(tokenizer)
    torch.manual_seed(0)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        trained.folder, dtype=torch.float32, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}

    def trainer_of(model: Any) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=25,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            seed=1,
        )
        return Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
        )

    trainer = trainer_of(model)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    trainer.save_model(str(tmp_path / "tuned"))
    again = load(AutoModelForSequenceClassification, tmp_path / "tuned")
    expected = trainer.predict(rows).predictions
    np.testing.assert_array_equal(trainer_of(again).predict(rows).predictions, expected)


def test_sentence_transformers_pools_our_hidden_states(trained: Trained) -> None:
    """The folder becomes a mean-pooling model; texts over the longest row are cut, not refused."""
    package = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    sentences = package.SentenceTransformer(str(trained.folder), device="cpu")
    assert sentences.max_seq_length == LONGEST
    texts = [*SENTENCES, *TEXTS]
    embeddings = sentences.encode(texts, batch_size=3, convert_to_tensor=True)
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    given = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    mask = given["attention_mask"]
    hidden = our_hidden(trained.model, given["input_ids"], mask)
    hidden = hidden.masked_fill(mask[..., None] == 0, 0.0)  # of no meaning at padding
    expected = hidden.sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch copies its own trees
def test_onnx_gives_the_same_logits_at_any_shape(trained: Trained, tmp_path: Path) -> None:
    for name in EXPORTERS:
        pytest.importorskip(name, reason=f"ONNX needs {', '.join(EXPORTERS)}")
    import onnxruntime

    model = load(AutoModelForMaskedLM, trained.folder)
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    traced = tokenizer(SENTENCES[:2], padding=True, return_tensors="pt")
    any_size = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        kwargs=dict(traced),
        f=str(path),
        input_names=list(traced),
        output_names=["logits"],
        dynamic_shapes=dict.fromkeys(traced, any_size),
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for texts in (SENTENCES, SENTENCES[:1], TEXTS):
        given = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        assert given["input_ids"].shape != traced["input_ids"].shape
        (logits,) = session.run(["logits"], {name: value.numpy() for name, value in given.items()})
        mask = given["attention_mask"].bool()
        with torch.no_grad():
            expected = model(**given).logits
            ours = trained.model.mlm_logits(
                our_hidden(trained.model, given["input_ids"], mask)[mask]
            )
        found = torch.tensor(logits)
        assert found.isfinite().all()  # also at padding, where a window holds no token at all
        torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-4)
        torch.testing.assert_close(found[mask], ours, rtol=0, atol=1e-4)


def make_checkpoint(folder: Path, hf: Path) -> Path:
    """A checkpoint with nothing but the hf folder, under a manifest."""
    (folder / "hf").parent.mkdir(parents=True)
    shutil.copytree(hf, folder / "hf")
    files = {
        f"hf/{path.name}": {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(hf.iterdir())
    }
    (folder / "MANIFEST.json").write_text(json.dumps({"format": FORMAT, "files": files}))
    return folder


@pytest.mark.parametrize(
    ("kind", "auto"), [("encoder", AutoModel), ("masked-lm", AutoModelForMaskedLM)]
)
def test_exported_class_loads_without_a_key_too_many(
    trained: Trained, tmp_path: Path, kind: str, auto: Any
) -> None:
    """encoder of bert: the pooler is among its weights."""
    checkpoint = make_checkpoint(tmp_path / "step-00000060", trained.folder)
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--as", kind]) == 0
    model, info = auto.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(model).__name__ == CLASSES[trained.model.config.architecture, kind]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in stored.items())
    given = AutoTokenizer.from_pretrained(tmp_path / "out")(SENTENCES[0], return_tensors="pt")
    hidden = our_hidden(trained.model, given["input_ids"], given["attention_mask"])
    with torch.no_grad():
        output = model.eval()(**given)
        ours = hidden if kind == "encoder" else trained.model.mlm_logits(hidden[0])[None]
    theirs = output.last_hidden_state if kind == "encoder" else output.logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max())


def unpacked(batch: Batch, pad_id: int) -> dict[str, torch.Tensor]:
    """Each packed sequence in a row of its own, as transformers takes them."""
    flat_labels = torch.full((batch.input_ids.numel(),), -100)
    index, masked = batch.targets["mlm"]
    flat_labels[index] = masked
    labels = flat_labels.view_as(batch.input_ids)
    slots = [
        (row, batch.sequence_ids[row] == number)
        for row in range(len(batch.sequence_ids))
        for number in range(int(batch.sequence_ids[row].max()) + 1)
    ]

    def padded(values: torch.Tensor, padding: int) -> torch.Tensor:
        sequences = [values[row][chosen] for row, chosen in slots]
        return torch.nn.utils.rnn.pad_sequence(sequences, True, padding)

    return {
        "input_ids": padded(batch.input_ids, pad_id),
        "token_type_ids": padded(batch.token_type_ids, 0),
        "attention_mask": padded(torch.ones_like(batch.input_ids), 0),
        "labels": padded(labels, -100),
    }


def test_masked_lm_loss_of_a_packed_batch_is_theirs(trained: Trained) -> None:
    """fp32, mean over the masked tokens, relative 1e-5; and far below that of a guess."""
    with torch.no_grad():
        losses = trained.model(**trained.batch.model_inputs(torch.device("cpu")))
        given = unpacked(trained.batch, trained.model.pad_token_id)
        if trained.model.config.architecture == "modernbert":
            del given["token_type_ids"]
        output = load(AutoModelForMaskedLM, trained.folder)(**given)
    assert (
        len(given["input_ids"])
        == len(trained.batch.sequence_lengths)
        > len(trained.batch.input_ids)
    )
    assert (given["labels"] >= 0).sum() == losses["mlm"].count > 50
    loss = (losses["mlm"].loss_sum / losses["mlm"].count).item()
    assert loss == pytest.approx(output.loss.item(), rel=1e-5)
    direct = F.cross_entropy(output.logits.flatten(0, 1), given["labels"].flatten())
    assert loss == pytest.approx(direct.item(), rel=1e-5)
    assert loss < 0.9 * math.log(trained.model.vocab_size)
