"""`cloze evaluate RUN|FOLDER [DATASET]`: a checkpoint or a Hugging Face folder in, its held-out measures out.

cloze evaluate RUN [DATASET] [--step N]   the newest intact checkpoint, on the run's own held-out rows
cloze evaluate FOLDER DATASET             an exported folder, BERT or ModernBERT

Nothing of the run is written or locked: it may be training meanwhile. One process; no DeepSpeed.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from data.heldout import heldout_batches, heldout_documents, pieces_of
from data.masking import Vocabulary
from data.shards import Dataset
from launcher.evaluate_report import as_text
from launcher.evaluate_subject import Subject, check, find_subject
from model.from_hf import load_model
from model.pretraining import ForPreTraining
from model.tasks import heads_of
from trainer.evaluation import guessing_of
from trainer.measuring import (
    Specials,
    Sums,
    exp,
    measure,
    pseudo_log_likelihood,
    tasks_with_heads,
)

FIRST_MARK = 1024  # rows after which it is told how many there were; then after twice as many


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "run (its newest intact checkpoint), checkpoint, or folder of `cloze export`"
    parser.add_argument("source", type=Path, help=what)
    parser.add_argument("dataset", nargs="?", help="folder or URL; default: the run's own")
    add = parser.add_argument
    add("--step", type=int, help="of the run's checkpoints, that of this step")
    add("--rows", type=int, help="the first so many held-out rows (default: all)")
    add(
        "--pseudo-perplexity",
        action="store_true",
        help="also mask each token of some documents alone (Salazar et al. 2020)",
    )
    add("--documents", type=int, default=100, help="held-out, for that (default: %(default)s)")
    add("--sequence-length", type=int, help="row slots (default: the run's at that step, or 128)")
    add("--micro-batch", type=int, help="rows of a forward pass (default: the run's, or 8)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="default: %(default)s")
    add("--json", action="store_true", help="for programs")


def run(options: argparse.Namespace) -> int:
    """Print what was measured. ValueError and OSError say what is wrong."""
    for name in ("rows", "documents", "micro_batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} is below 1")
    subject = find_subject(options)
    dataset = Dataset.open(subject.data.path, subject.data.storage)
    check(subject, dataset)
    report = evaluate(
        subject,
        dataset,
        precision=options.precision,
        num_rows=options.rows,
        num_documents=options.documents if options.pseudo_perplexity else 0,
    )
    print(json.dumps(report, indent=1) if options.json else as_text(report))
    return 0


def evaluate(
    subject: Subject,
    dataset: Dataset,
    *,
    precision: Literal["fp32", "bf16"],
    num_rows: int | None,
    num_documents: int,
) -> dict[str, Any]:
    """The report, as --json prints it. num_documents: for the pseudo-perplexity; 0: none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    pad_id = dataset.special_ids["[PAD]"]
    model, missing = load_model(subject.folder, pad_token_id=pad_id, device=device, dtype=dtype)
    if not tasks_with_heads(model.config.tasks, missing):
        raise ValueError(
            f"{subject.folder} has no head for {', '.join(model.config.tasks)}: export it with --as "
            "masked-lm, or whole"
        )
    if num_documents and "mlm_head" not in heads_of(model.config.tasks):
        raise ValueError(f"{subject.folder} predicts no tokens: it has no pseudo-perplexity")
    report = {
        "model": str(subject.folder),
        "step": subject.step,
        "dataset": dataset.place,
        "dataset_digest": dataset.digest,
        "sequence_length": subject.data.sequence_length,
        "objectives": subject.data.objectives,
        "masked_fraction": subject.data.masked_fraction,
        "seed": subject.seed,
        "precision": precision,
        "device": device.type,
        **_rows_measured(model, missing, subject, dataset, num_rows),
    }
    if num_documents:
        report["pseudo"] = _pseudo_measured(model, subject, dataset, num_documents)
    return report


def _rows_measured(
    model: ForPreTraining,
    missing: list[str],
    subject: Subject,
    dataset: Dataset,
    num_rows: int | None,
) -> dict[str, Any]:
    """{"together": values, "guessing": its lines by task, "sources": {source: values}}"""
    batches = heldout_batches(
        dataset,
        subject.data,
        subject.seed,
        rows_per_batch=subject.micro_batch_size,
        num_rows=num_rows,
    )
    device = next(model.parameters()).device
    together, sources, mark = Sums(), {name: Sums() for name in dataset.sources}, FIRST_MARK
    for source, sums in measure(model, batches, device, missing=missing):
        together.add(sums)
        sources[source].add(sums)
        if together.num_rows >= mark:
            print(f"{together.num_rows:,} rows ...", file=sys.stderr, flush=True)
            mark *= 2
    return {
        "together": (values := together.values()),
        "guessing": guessing_of(values, together.asked, dataset.manifest),
        "sources": {name: sums.values() for name, sums in sources.items() if sums.num_rows},
    }


def _pseudo_measured(
    model: ForPreTraining, subject: Subject, dataset: Dataset, num_documents: int
) -> dict[str, Any]:
    """{"together": values, "sources": {source: values}} of documents, each token masked alone."""
    vocabulary = Vocabulary.of(dataset.special_ids, dataset.vocab_size)
    specials = Specials(vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id)
    slots = subject.data.sequence_length
    device = next(model.parameters()).device

    def of(tokens: Any) -> float:
        return sum(
            pseudo_log_likelihood(
                model, piece, specials, device, slots_at_once=slots * subject.micro_batch_size
            )
            for piece in pieces_of(tokens, slots - 2)
        )

    found: dict[str, list[tuple[int, float]]] = {}
    for source, tokens in heldout_documents(dataset, num_documents):
        found.setdefault(source, []).append((len(tokens), of(tokens)))
    return {
        "together": _pseudo_values(entry for entries in found.values() for entry in entries),
        "sources": {name: _pseudo_values(iter(found[name])) for name in sorted(found)},
    }


def _pseudo_values(documents: Iterator[tuple[int, float]]) -> dict[str, float]:
    """Of (tokens, log likelihood) of some documents."""
    lengths, likelihoods = zip(*documents, strict=True)
    loss = -sum(likelihoods) / sum(lengths)
    return {
        "num_documents": len(lengths),
        "num_tokens": sum(lengths),
        "pseudo_loss": loss,
        "pseudo_perplexity": exp(loss),
    }
