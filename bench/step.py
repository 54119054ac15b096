"""Real text in, tokens a second of a whole training step out, beside transformers' BertForPreTraining.

    python -m bench.step TEXT.jsonl [...] [--length 128] [--rows 32] [--layers 12 --hidden 768]

Every way gets the same batches: sequence pairs of the text as they come, one to a row, 15 % masked. A step
is forward, backward, gradient clipping and AdamW on fp32 weights. Steps of all ways take turns in one run, so
that a neighbour on the machine slows all of them; only real tokens count, not padding. Read the ratios.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from transformers import BertConfig, BertForPreTraining

from bench.budget import time_budget
from bench.text import plain_jsonl
from data.batch import Batch, Reader, build_loader
from data.lanes import DataConfig, StreamState
from data.prepare import PrepareConfig, prepare
from model.config import Backend, ModelConfig
from model.flops import attended_pairs, flops_per_step, peak_flops
from model.heads import IGNORED
from model.weights import build

PACKAGES = ("torch", "transformers", "numpy")
LEARNING_RATE = 1e-4
DEFAULTS = "transformers, its defaults"


class Way(NamedTuple):
    name: str
    step: Callable[[Batch], None]


class Masters:
    """AdamW (fused) on fp32 copies of bf16 weights, as ZeRO keeps them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.masters: list[torch.Tensor] = [
            p.detach().float().clone().requires_grad_() for p in self.weights
        ]
        self.adam = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, fused=True)

    def step(self) -> None:
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adam.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)


def our_way(
    name: str, config: ModelConfig, vocab_size: int, device: torch.device, kind: str
) -> Way:
    """Heads on labelled rows, no padding inside. kind: "bf16" weights with fp32 masters, or all in "fp32"."""
    model = build(config, vocab_size).to(
        device, torch.bfloat16 if kind == "bf16" else torch.float32
    )
    step = Masters(model).step if kind == "bf16" else plain_step(model, is_fused=True)

    def whole(batch: Batch) -> None:
        losses = model(**batch.model_inputs(device))
        mlm = losses.mlm_loss_sum / losses.num_masked
        (mlm + losses.nsp_loss_sum / losses.num_pairs).backward()
        step()

    return Way(name, whole)


def plain_step(model: torch.nn.Module, *, is_fused: bool) -> Callable[[], None]:
    adam = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=is_fused or None)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step


def their_inputs(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    labels = torch.full((batch.input_ids.numel(),), IGNORED)
    labels[batch.masked_index] = batch.masked_labels
    inputs = {
        "input_ids": batch.input_ids,
        "token_type_ids": batch.token_type_ids,
        "attention_mask": (batch.sequence_ids >= 0).long(),
        "labels": labels.view_as(batch.input_ids),
        "next_sentence_label": batch.nsp_labels,
    }
    return {name: value.to(device) for name, value in inputs.items()}


def their_way(
    name: str, config: ModelConfig, vocab_size: int, device: torch.device, kind: str
) -> Way:
    """kind: "defaults", as a user would write it, in fp32; the same with fused AdamW, in "fp32", under
    "autocast", or with weights in "bf16" and the masters that ours has. Attention is SDPA, as by default.
    """
    fields = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob",
    )  # fmt: skip
    theirs = BertConfig(
        vocab_size=vocab_size, **{field: getattr(config, field) for field in fields}
    )
    model: Any = BertForPreTraining(theirs)
    model.to(device, torch.bfloat16 if kind == "bf16" else torch.float32).train()
    step = Masters(model).step if kind == "bf16" else plain_step(model, is_fused=kind != "defaults")

    def whole(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=kind == "autocast"):
            loss = model(**their_inputs(batch, device)).loss
        loss.backward()
        step()

    return Way(name, whole)


def ways_of(
    config: ModelConfig, vocab_size: int, device: torch.device, backends: list[Backend]
) -> Iterator[Way]:
    for backend in backends:
        for kind in ("bf16", "fp32"):
            changed = replace(config, attention=backend)
            yield our_way(f"cloze, {kind}, {backend}", changed, vocab_size, device, kind)
    yield their_way(DEFAULTS, config, vocab_size, device, "defaults")
    for kind in ("fp32", "autocast", "bf16"):
        yield their_way(f"transformers, {kind}, fused AdamW", config, vocab_size, device, kind)


def batches_of(dataset: str, rows: int, length: int, number: int) -> list[Batch]:
    data = DataConfig(path=dataset, sequence_length=length, packing=False, num_lanes=rows)
    loader = build_loader(data, Reader(0, 1, rows, rows, seed=1), StreamState.start(rows, 1))
    return [next(loader).batch for _ in range(number)]


def measure(
    ways: list[Way], batches: list[Batch], device: torch.device, *, warm_up: int
) -> dict[str, list[float]]:
    """Tokens a second of each step, by way. All ways take their turn with a batch before the next batch."""
    rates: dict[str, list[float]] = {way.name: [] for way in ways}
    for number, batch in enumerate(batches):
        for way in ways:
            torch.manual_seed(number)
            started = time.perf_counter()
            way.step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
            if number >= warm_up:
                rates[way.name].append(batch.num_tokens / seconds)
    return rates


def flops_per_token(config: ModelConfig, vocab_size: int, batches: list[Batch]) -> float:
    flops = sum(
        flops_per_step(
            config,
            vocab_size,
            num_tokens=batch.num_tokens,
            num_attended={w: attended_pairs(batch.sequence_lengths, w) for w in config.windows},
            num_masked=len(batch.masked_labels),
            num_pairs=len(batch.nsp_labels),
        )
        for batch in batches
    )
    return flops / sum(batch.num_tokens for batch in batches)


def table(rates: dict[str, list[float]], flops: float, peak: float | None) -> Iterator[str]:
    """Markdown. The ratios are to transformers' defaults, and to the best of its ways."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max(median for name, median in medians.items() if name.startswith("transformers"))
    yield "| way | tokens/s, median | least to most | TFLOP/s | MFU | to its defaults | to its best |"
    yield "|---|---|---|---|---|---|---|"
    for name, values in rates.items():
        used = medians[name] * flops
        mfu = f"{used / peak:.1%}" if peak else "-"
        yield (
            f"| {name} | {medians[name]:,.0f} | {min(values):,.0f} to {max(values):,.0f} | {used / 1e12:.3f} "
            f"| {mfu} | {medians[name] / medians[DEFAULTS]:.2f} x | {medians[name] / best:.2f} x |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("text", nargs="+", help=".txt, .jsonl or .parquet files, also compressed")
    parser.add_argument("--length", type=int, default=128, help="slots of a row")
    parser.add_argument("--rows", type=int, default=32, help="of a batch")
    parser.add_argument(
        "--steps", type=int, default=7, help="of each way, the first two not counted"
    )
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=30000)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--backends", nargs="+", default=["auto"], help="of model.attention")
    parser.add_argument("--compile", action="store_true", help="our layers, by torch.compile")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ModelConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        intermediate_size=4 * options.hidden,
        max_position_embeddings=max(512, options.length),
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.dropout,
        compile=options.compile,
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    print(
        f"{name or platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {packages}"
    )
    with tempfile.TemporaryDirectory(prefix="cloze-bench-") as folder:
        dataset = str(Path(folder, "dataset"))
        text = plain_jsonl(options.text, Path(folder, "text.jsonl"), 20_000_000)
        prepare(
            PrepareConfig(
                output=dataset,
                sources={"text": (str(text),)},
                vocab_size=options.vocab_size,
                num_processes=os.cpu_count() or 1,
            )
        )
        batches = batches_of(dataset, options.rows, options.length, options.steps)
    tokens = sum(batch.num_tokens for batch in batches)
    slots = sum(batch.input_ids.numel() for batch in batches)
    print(f"\n{options.layers} layers of {options.hidden}, {options.rows} rows of {options.length} slots, "
          f"{tokens / slots:.0%} of them filled, dropout {options.dropout}\n")  # fmt: skip
    ways = list(ways_of(config, options.vocab_size, device, options.backends))
    rates = measure(ways, batches, device, warm_up=min(2, options.steps - 1))
    flops = flops_per_token(config, options.vocab_size, batches)
    peak = peak_flops(name) if device.type == "cuda" else None
    for line in table(rates, flops, peak):
        print(line)
    if device.type == "cpu":
        fastest = max(
            ways[: 2 * len(options.backends)], key=lambda way: statistics.median(rates[way.name])
        )
        print(f"\nWhere the time of a step goes, {fastest.name}:\n\n| work | share |\n|---|---|")
        for kind, share in time_budget(lambda: fastest.step(batches[-1])).items():
            print(f"| {kind} | {share:.1%} |")


if __name__ == "__main__":
    main()
