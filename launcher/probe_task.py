"""An encoder and a task with labels in, what its probes get right out: a line for each probe and feature."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer

from data.hashing import hash_order, stable_hash64
from data.labelled import Examples, LabelledTask
from launcher.probe_scores import accuracy, macro_f1, majority_class, matthews, wilson_interval
from model.classifiers import choose_l2, fit_linear, nearest_labels, standardise
from model.features import Features, encode
from model.pretraining import ForPreTraining

PROBES = ("linear", "knn")
FEATURES = Features._fields
METRICS = {"accuracy": accuracy, "matthews": matthews, "macro_f1": macro_f1}
MAX_TOKENS = 256  # longer sequences are cut, the longer part of a pair first


class Sequences(NamedTuple):
    input_ids: list[list[int]]
    types: list[list[int]]  # 0, and 1 in the second part of a pair


def tokenise(folder: Path, texts: list[tuple[str, ...]], max_tokens: int) -> Sequences:
    """[CLS] text [SEP], or [CLS] text [SEP] text [SEP], by the tokenizer beside a model."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    parts = [list(part) for part in zip(*texts, strict=True)]
    found = tokenizer(
        *parts, truncation=True, max_length=max_tokens, return_token_type_ids=True,
        return_attention_mask=False,
    )  # fmt: skip
    return Sequences(found["input_ids"], found["token_type_ids"])


def metric_of(task: LabelledTask) -> str:
    """CoLA has Matthews' correlation, as in GLUE; other sets macro F1 if train is unbalanced, or accuracy."""
    if task.name.lower() == "cola":
        return "matthews"
    return "macro_f1" if task.is_unbalanced else "accuracy"


def probe_task(model: ForPreTraining, folder: Path, task: LabelledTask) -> list[dict[str, Any]]:
    """A line for each of `PROBES` on each of `FEATURES`; folder: of the model, for its tokenizer."""
    max_tokens = min(MAX_TOKENS, model.config.max_position_embeddings)
    train, evaluation = (
        encode(model, *tokenise(folder, part.texts, max_tokens))
        for part in (task.train, task.evaluation)
    )
    return [
        _line(task, probe, name, *_guess(task, probe, train_ND, other_MD))
        for name, train_ND, other_MD in zip(FEATURES, train, evaluation, strict=True)
        for probe in PROBES
    ]


def _guess(
    task: LabelledTask, probe: str, train_ND: torch.Tensor, other_MD: torch.Tensor
) -> tuple[np.ndarray, dict[str, float]]:
    """Classes of the evaluated rows, and what was chosen for that."""
    labels, num_classes = torch.from_numpy(task.train.labels), len(task.classes)
    train_ND, other_MD = standardise(train_ND, other_MD)
    if probe == "knn":
        return nearest_labels(train_ND, labels, other_MD, num_classes).numpy(), {}
    order = hash_order(stable_hash64("probe", task.name, "choice"), len(labels))
    l2 = choose_l2(train_ND, labels, num_classes, torch.from_numpy(order))
    fitted = fit_linear(train_ND, labels, num_classes, l2)
    return fitted.logits(other_MD).argmax(1).numpy(), {"l2": l2}


def _line(
    task: LabelledTask, probe: str, features: str, guessed: np.ndarray, chosen: dict[str, float]
) -> dict[str, Any]:
    true, metric = task.evaluation.labels, metric_of(task)
    right, majority = accuracy(guessed, true), _majority(task.train, task.evaluation)
    interval = wilson_interval(right, len(true))
    return {
        "task": task.name,
        "probe": probe,
        "features": features,
        "split": task.split,
        "accuracy": round(right, 6),
        "interval": [round(end, 6) for end in interval],  # of 95 %
        "metric": metric,
        "score": round(METRICS[metric](guessed, true), 6),
        "majority_accuracy": round(accuracy(majority, true), 6),
        "majority_score": round(METRICS[metric](majority, true), 6),
        "num_train": len(task.train.labels),
        "num_evaluated": len(true),
        "num_classes": len(task.classes),
        **chosen,
        "data": task.digest,
    }


def _majority(train: Examples, evaluation: Examples) -> np.ndarray:
    return np.full(len(evaluation.labels), majority_class(train.labels))
