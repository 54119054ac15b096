"""`cloze evaluate`: the run's own figures again, those of transformers, and each source's part in them."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, environment, launch, read_metrics, tiny_preset

from data.batch import heldout_rows
from data.heldout import heldout_batches, heldout_documents, pieces_of, source_of
from data.lanes import DataConfig
from data.pairs import UNLABELLED
from data.rows import Row
from data.shards import Dataset
from launcher import cli
from model.config import ModelConfig
from model.hf import export_hf
from model.weights import build

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two phases, evaluated and saved at steps 3, 6 and 8; rows are shorter from step 6 on."""
    folder = tmp_path_factory.mktemp("evaluate")
    phases = [{"first_step": 6, "sequence_length": 32, "masked_fraction": 0.3}]
    preset = tiny_preset(folder, tiny_dataset, eval_every=3, phases=phases)
    result = launch(preset)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def fresh_folder(folder: Path, dataset: Path, architecture: Any) -> Path:
    """A model that has learned nothing, but with the spread-out weights of one that has."""
    opened = Dataset.open(dataset)
    config = ModelConfig(architecture=architecture, **SMALL)
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: value.detach() + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in build(config, opened.vocab_size, seed=2).named_parameters()
    }
    export_hf(
        weights, config, opened.vocab_size, folder,
        tokenizer_folder=dataset / "tokenizer", model_card=None,
    )  # fmt: skip
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.main(["evaluate", *map(str, arguments)]) == 78
    return capsys.readouterr().err


def test_the_figures_of_training_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each step's evaluation had the rows of the phase that the step was of."""
    logged = {line["step"]: line for line in read_metrics(finished, "heldout")}
    assert sorted(logged) == [3, 6, 8]
    before = contents(finished)
    for step, slots in ((3, 64), (6, 64), (8, 32)):
        report = evaluate(capsys, finished, "--step", step, "--rows", 24)
        assert (report["step"], report["sequence_length"]) == (step, slots)
        assert report["together"]["num_rows"] == 24
        for name, value in logged[step].items():
            if name.endswith(("_loss", "_accuracy", "_labels")):
                assert report["together"][name] == pytest.approx(value, rel=1e-5), (step, name)
        assert report["guessing"] == logged[step]["guessing"]
    assert evaluate(capsys, finished, "--rows", 24) == report  # the newest one
    checkpoint = finished / "checkpoints" / "step-00000008"
    assert evaluate(capsys, checkpoint, "--rows", 24) == report
    assert contents(finished) == before


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_run_in_bf16(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights rounded the same way; what fp32 says of them is near."""
    assert launch(tiny_preset(tmp_path, tiny_dataset, precision="bf16")).returncode == 0
    (logged,) = read_metrics(tmp_path / "run", "heldout")
    for precision, tolerance in (("bf16", 1e-3), ("fp32", 1e-2)):
        report = evaluate(capsys, tmp_path / "run", "--rows", 24, "--precision", precision)
        for name in ("mlm_loss", "nsp_loss"):
            assert report["together"][name] == pytest.approx(logged[name], rel=tolerance)


def test_all_rows_and_their_sources(
    finished: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = Dataset.open(tiny_dataset)
    report = evaluate(capsys, finished, "--step", 3)
    together, sources = report["together"], report["sources"]
    assert list(sources) == ["first", "second"]
    data = DataConfig(str(tiny_dataset), sequence_length=64)
    rows = heldout_rows(dataset, data, 1, 10**9)
    assert together["num_rows"] == len(rows)
    assert together["num_mlm_labels"] == sum(len(row.masked_labels) for row in rows)
    for name in ("num_rows", "num_tokens", "num_mlm_labels", "num_nsp_labels"):
        assert together[name] == sum(values[name] for values in sources.values())
    for value, count in (("mlm_loss", "num_mlm_labels"), ("nsp_accuracy", "num_nsp_labels")):
        weighted = sum(values[value] * values[count] for values in sources.values())
        assert together[value] == pytest.approx(weighted / together[count], rel=1e-9)
    assert together["mlm_perplexity"] == pytest.approx(math.exp(together["mlm_loss"]))
    assert sources["first"]["mlm_loss"] != sources["second"]["mlm_loss"]
    manifest = dataset.manifest
    nats = {name: line[0] for name, line in report["guessing"]["mlm"].items()}
    assert nats == {
        "context free": manifest["context_free_loss_nats"],
        "unigram": manifest["unigram_entropy_nats"],
    }
    labels = [label for row in rows for label in row.pair_labels.tolist() if label != UNLABELLED]
    shares = [labels.count(label) / len(labels) for label in (0, 1)]
    entropy = -sum(share * math.log(share) for share in shares)
    assert report["guessing"]["nsp"] == {"guessing": pytest.approx([entropy, max(shares)])}


def test_rows_come_from_the_source_they_are_said_to(tiny_dataset: Path) -> None:
    """Digests of rows, block by block, against those of the batches, in any order."""
    dataset = Dataset.open(tiny_dataset)
    data = DataConfig(str(tiny_dataset), sequence_length=64)
    expected = {
        source: sorted(
            row.input_ids.tolist()
            for block in dataset.block_indices("heldout", source).tolist()
            for row in heldout_rows_of_block(dataset, data, block)
        )
        for source in dataset.sources
    }
    found: dict[str, list[list[int]]] = {source: [] for source in dataset.sources}
    for source, batch in heldout_batches(dataset, data, 1, rows_per_batch=3):
        assert len(batch.input_ids) <= 3
        filled = batch.sequence_ids >= 0
        found[source] += [
            ids[is_token].tolist() for ids, is_token in zip(batch.input_ids, filled, strict=True)
        ]
    assert {source: sorted(rows) for source, rows in found.items()} == expected
    few = list(heldout_batches(dataset, data, 1, rows_per_batch=4, num_rows=10))
    assert sum(len(batch.input_ids) for _, batch in few) == 10


def heldout_rows_of_block(dataset: Dataset, data: DataConfig, block: int) -> list[Row]:
    """By way of a dataset that has no other held-out block."""
    alone = Dataset.open(dataset.root)
    table = alone.blocks.copy()
    table["split"][:] = 0
    table["split"][block] = 1
    alone.blocks = table
    return heldout_rows(alone, data, 1, 10**9)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_transformers_computes_the_same(
    architecture: str, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own class, given one sequence after the other."""
    import transformers

    folder = fresh_folder(tmp_path / "hf", tiny_dataset, architecture)
    report = evaluate(capsys, folder, tiny_dataset, "--sequence-length", 64, "--rows", 12)
    kind = {"bert": "BertForPreTraining", "modernbert": "ModernBertForMaskedLM"}[architecture]
    model = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    data = DataConfig(str(tiny_dataset), sequence_length=64)
    rows = heldout_rows(Dataset.open(tiny_dataset), data, 1, 12)
    sums = by_transformers(model.eval(), rows, with_types=architecture == "bert")
    together = report["together"]
    assert together["num_mlm_labels"] == sums["masked"]
    assert together["mlm_loss"] == pytest.approx(sums["mlm"] / sums["masked"], rel=1e-5)
    assert together["mlm_accuracy"] == pytest.approx(sums["right"] / sums["masked"])
    if architecture == "bert":  # the other has no such head in transformers
        assert together["num_nsp_labels"] == sums["pairs"]
        assert together["nsp_loss"] == pytest.approx(sums["nsp"] / sums["pairs"], rel=1e-5)
        assert together["nsp_accuracy"] == pytest.approx(sums["nsp_right"] / sums["pairs"])


@torch.no_grad()
def by_transformers(model: Any, rows: list[Row], *, with_types: bool) -> dict[str, float]:
    sums = dict.fromkeys(("mlm", "masked", "right", "nsp", "pairs", "nsp_right"), 0.0)
    for row in rows:
        ends = row.sequence_lengths.cumsum().tolist()
        labels = dict(zip(row.masked_positions.tolist(), row.masked_labels.tolist(), strict=True))
        for (start, end), is_random in zip(
            itertools.pairwise([0, *ends]), row.pair_labels.tolist(), strict=True
        ):
            inputs = {"input_ids": torch.tensor([row.input_ids[start:end].tolist()])}
            if with_types:
                inputs["token_type_ids"] = torch.tensor([row.token_type_ids[start:end].tolist()])
            output = model(**inputs)
            logits = output.prediction_logits if with_types else output.logits
            for place in range(start, end):
                if place in labels:
                    scores = logits[0, place - start].log_softmax(-1)
                    sums["mlm"] -= scores[labels[place]].item()
                    sums["masked"] += 1
                    sums["right"] += scores.argmax().item() == labels[place]
            if with_types and is_random >= 0:
                scores = output.seq_relationship_logits[0].log_softmax(-1)
                sums["nsp"] -= scores[is_random].item()
                sums["pairs"] += 1
                sums["nsp_right"] += scores.argmax().item() == is_random
    return sums


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_pseudo_perplexity_is_that_of_one_token_at_a_time(
    architecture: str, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    folder = fresh_folder(tmp_path / "hf", tiny_dataset, architecture)
    report = evaluate(
        capsys, folder, tiny_dataset, "--sequence-length", 40, "--rows", 4,
        "--pseudo-perplexity", "--documents", 2,
    )["pseudo"]  # fmt: skip
    kind = {"bert": "BertForMaskedLM", "modernbert": "ModernBertForMaskedLM"}[architecture]
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    dataset = Dataset.open(tiny_dataset)
    documents = list(heldout_documents(dataset, 2))
    losses = {source: 0.0 for source in dataset.sources}
    lengths = dict.fromkeys(losses, 0)
    for source, tokens in documents:
        for piece in pieces_of(tokens, 38):
            losses[source] += one_token_at_a_time(model, piece.tolist(), dataset.special_ids)
        lengths[source] += len(tokens)
    assert report["together"]["num_documents"] == 2
    assert report["together"]["num_tokens"] == sum(lengths.values())
    mean = sum(losses.values()) / sum(lengths.values())
    assert report["together"]["pseudo_perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    for source, values in report["sources"].items():
        assert values["pseudo_loss"] == pytest.approx(losses[source] / lengths[source], rel=1e-4)


@torch.no_grad()
def one_token_at_a_time(model: Any, tokens: list[int], special_ids: dict[str, int]) -> float:
    """The slow twin: nats that all tokens of a piece cost, each masked in a forward pass of its own."""
    ids = [special_ids["[CLS]"], *tokens, special_ids["[SEP]"]]
    loss = 0.0
    for place in range(1, len(ids) - 1):
        masked = [*ids[:place], special_ids["[MASK]"], *ids[place + 1 :]]
        logits = model(input_ids=torch.tensor([masked])).logits
        loss -= logits[0, place].log_softmax(-1)[ids[place]].item()
    return loss


def test_documents_and_their_pieces(tiny_dataset: Path) -> None:
    dataset = Dataset.open(tiny_dataset)
    every = list(heldout_documents(dataset, 10**9))
    blocks = dataset.block_indices("heldout").tolist()
    total = sum(int(dataset.blocks[block]["num_documents"]) for block in blocks)
    tokens = sum(int(dataset.blocks[block]["num_tokens"]) for block in blocks)
    assert (len(every), sum(len(found) for _, found in every)) == (total, tokens)
    for (source, found), block in zip(every, blocks, strict=False):  # the first of each block
        first = dataset.read_block(block)
        assert source == source_of(dataset, block)
        assert found.tolist() == first.tokens[: first.document_lengths[0]].tolist()
    for longest in (1, 7, 100):
        pieces = pieces_of(every[0][1], longest)
        assert [token for piece in pieces for token in piece] == every[0][1].tolist()
        sizes = [len(piece) for piece in pieces]
        assert max(sizes) <= longest and max(sizes) - min(sizes) <= 1


def test_a_folder_without_the_next_sentence_head(
    finished: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("masked-lm", "encoder"):
        assert cli.main(["export", str(finished), str(tmp_path / kind), "--as", kind]) == 0
    arguments = ("--sequence-length", 32, "--rows", 10)
    values = evaluate(capsys, tmp_path / "masked-lm", tiny_dataset, *arguments)["together"]
    whole = finished / "checkpoints" / "step-00000008" / "hf"
    expected = evaluate(capsys, whole, tiny_dataset, *arguments)["together"]
    assert values["mlm_loss"] == expected["mlm_loss"] and "num_nsp_labels" not in values
    assert "nsp_loss" in expected and "nsp_loss" not in values
    assert "has no head for mlm, nsp" in refused(capsys, tmp_path / "encoder", tiny_dataset)


def test_a_table_for_people(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "24", "--pseudo-perplexity", "--documents", "9"]
    report = evaluate(capsys, finished, *arguments)
    pseudo = report["pseudo"]
    assert list(pseudo["sources"]) == ["first", "second"]
    for name in ("num_documents", "num_tokens"):
        found = sum(values[name] for values in pseudo["sources"].values())
        assert found == pseudo["together"][name]
    assert cli.main(["evaluate", str(finished), *arguments]) == 0
    text = capsys.readouterr().out
    header = next(line for line in text.splitlines() if line.startswith("source"))
    assert header.split()[1:11] == [
        "rows", "tokens", "mlm", "labels", "nsp", "labels", "mlm", "loss", "mlm", "accuracy",
    ]  # fmt: skip
    for name in ("first", "second", "all together"):
        values = report["sources"].get(name, report["together"])
        (line,) = (line for line in text.splitlines()[:8] if line.startswith(name))
        assert f"{values['mlm_loss']:.4f}" in line and f"{values['nsp_accuracy']:.2%}" in line
    (guess, right) = report["guessing"]["nsp"]["guessing"]
    assert f"; without learning: {guess:.4f} guessing ({right:.2%} right)" in text
    assert f"{report['pseudo']['together']['pseudo_perplexity']:.2f}" in text


def test_what_cannot_be_evaluated_is_refused(
    finished: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = finished / "checkpoints" / "step-00000008" / "hf"
    assert "has no checkpoint of step 4: there are [3, 6, 8]" in refused(
        capsys, finished, "--step", 4
    )
    assert "name the dataset" in refused(capsys, newest)
    assert "--step is of a run" in refused(capsys, newest, tiny_dataset, "--step", 3)
    assert "neither a run with a checkpoint" in refused(capsys, tmp_path)
    assert "--rows 0 is below 1" in refused(capsys, finished, "--rows", 0)
    assert "rows of 128 slots are over the model's 64" in refused(
        capsys, finished, "--sequence-length", 128
    )
    other = shutil.copytree(newest, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[-1], vocabulary[-2] = vocabulary[-2], vocabulary[-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "other tokens than the one beside the model" in refused(capsys, other, tiny_dataset)


def test_a_damaged_checkpoint_is_told_and_left_aside(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    weights = run / "checkpoints" / "step-00000008" / "hf" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert evaluate(capsys, run, "--rows", 4)["step"] == 6
    assert cli.main(["evaluate", str(run), "--rows", "4"]) == 0
    assert "step-00000008 is damaged and left aside" in capsys.readouterr().err
    assert "no checkpoint" in refused(capsys, run, "--step", 8)


def test_it_needs_no_deepspeed(finished: Path) -> None:
    script = (
        "import sys; from launcher.cli import main\n"
        f"assert main(['evaluate', {str(finished)!r}, '--rows', '4']) == 0\n"
        "assert 'deepspeed' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
