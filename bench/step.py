"""Real text in, tokens a second of a whole training step out, beside transformers' own model.

    python -m bench.step TEXT.jsonl [...] [--length 128] [--rows 32] [--layers 12 --hidden 768]
    python -m bench.step TEXT.jsonl --kind paragraphs --length 512       # lengths as they come
    python -m bench.step --dataset PREPARED --kind packed --deepspeed ds_configs/zero1.json --compile

Every way gets the same batches, 15 % masked. A step is forward, backward,
gradient clipping and AdamW on fp32 weights. Steps of all ways take turns in one run, so that a neighbour on
the machine slows all of them; only real tokens count, not padding. Read the ratios. Packed rows, in which
sequences share a row, are for ours alone: transformers would let them see each other.
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
from typing import Any, NamedTuple, get_args

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from transformers import (
    BertConfig,
    BertForPreTraining,
    ModernBertConfig,
    ModernBertForMaskedLM,
)

from bench.budget import time_budget
from bench.step_batches import batches_of_paragraphs, batches_of_rows, fill, labels_of
from bench.text import plain_jsonl
from data.collate import Batch
from data.prepare import PrepareConfig, prepare
from data.shards import Dataset
from model.config import Architecture, ModelConfig
from model.flops import attended_pairs, flops_per_step, peak_flops
from model.heads import IGNORED, TaskLoss
from model.hf import hf_config
from model.weights import build, build_empty, fresh_weights

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
        mean_loss(model(**batch.model_inputs(device))).backward()
        step()

    return Way(name, whole)


def mean_loss(losses: dict[str, TaskLoss]) -> torch.Tensor:
    return torch.stack([loss.loss_sum / loss.count for loss in losses.values()]).sum()


def plain_step(model: torch.nn.Module, *, is_fused: bool) -> Callable[[], None]:
    adam = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=is_fused or None)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step


def deepspeed_way(
    name: str, config: ModelConfig, vocab_size: int, device: torch.device, path: Path, rows: int
) -> Way:
    """The trainer's own engine, in one process."""
    from trainer.ds import read_deepspeed_json, resolve
    from trainer.engine import build_engine, set_accumulation, start_world
    from trainer.optim_config import OptimConfig

    start_world()
    settings = resolve(
        read_deepspeed_json(path),
        micro_batch_size=rows,
        accumulation=1,
        clip_norm=1.0,
        precision="bf16",
    )
    weights = fresh_weights(config, vocab_size, seed=0)
    optim = OptimConfig(learning_rate=LEARNING_RATE)
    engine = build_engine(build_empty(config, vocab_size), weights, optim, settings, device)

    def whole(batch: Batch) -> None:
        set_accumulation(engine, 0, 1)
        engine.backward(mean_loss(engine(**batch.model_inputs(device))))
        engine.step()

    return Way(name, whole)


def their_inputs(
    batch: Batch, device: torch.device, *, is_modern: bool, is_cut: bool
) -> dict[str, torch.Tensor]:
    """is_cut: padded to the longest row of the batch, not to the longest allowed."""
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": (batch.sequence_ids >= 0).long(),
        "labels": labels_of(batch, IGNORED),
    }
    if not is_modern:
        inputs["token_type_ids"] = batch.token_type_ids
    if is_cut:
        longest = int(batch.sequence_lengths.max())
        inputs = {name: value[:, :longest].contiguous() for name, value in inputs.items()}
    if not is_modern:
        inputs["next_sentence_label"] = batch.targets["nsp"].labels
    return {name: value.to(device) for name, value in inputs.items()}


def their_model(config: ModelConfig, vocab_size: int) -> Any:
    fields = hf_config(config, vocab_size, {"[PAD]": 0})
    if config.architecture == "modernbert":
        return ModernBertForMaskedLM(ModernBertConfig(**fields))
    return BertForPreTraining(BertConfig(**fields))


def their_way(
    name: str, config: ModelConfig, vocab_size: int, device: torch.device, kind: str
) -> Way:
    """kind: "defaults", as a user would write it, in fp32, padded to the longest row allowed; or with fused
    AdamW, padded to the longest of the batch, in "fp32", under "autocast", or with weights in "bf16" and the
    masters that ours has. Attention is SDPA, as by default.
    """
    model = their_model(config, vocab_size)
    is_cut = kind != "defaults"
    is_modern = config.architecture == "modernbert"
    model.to(device, torch.bfloat16 if kind == "bf16" else torch.float32).train()
    step = Masters(model).step if kind == "bf16" else plain_step(model, is_fused=kind != "defaults")

    def whole(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=kind == "autocast"):
            loss = model(**their_inputs(batch, device, is_modern=is_modern, is_cut=is_cut)).loss
        loss.backward()
        step()

    return Way(name, whole)


def ways_of(
    options: argparse.Namespace, config: ModelConfig, device: torch.device
) -> Iterator[Way]:
    vocab_size = options.vocab_size
    for backend in options.backends:
        changed = replace(config, attention=backend)
        for kind in options.precisions:
            yield our_way(f"cloze, {kind}, {backend}", changed, vocab_size, device, kind)
    if options.deepspeed:
        name = f"cloze, bf16, {options.deepspeed.stem}"
        yield deepspeed_way(name, config, vocab_size, device, options.deepspeed, options.rows)
    if options.kind == "packed":
        return
    yield their_way(DEFAULTS, config, vocab_size, device, "defaults")
    for kind in ("fp32", "autocast", "bf16"):
        yield their_way(f"transformers, {kind}, fused AdamW", config, vocab_size, device, kind)


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
            num_labels={task: len(labels) for task, (_, labels) in batch.targets.items()},
        )
        for batch in batches
    )
    return flops / sum(batch.num_tokens for batch in batches)


def table(rates: dict[str, list[float]], flops: float, peak: float | None) -> Iterator[str]:
    """Markdown. The ratios are to transformers' defaults, and to the best of its ways."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    theirs = [median for name, median in medians.items() if name.startswith("transformers")]
    yield "| way | tokens/s, median | least to most | TFLOP/s | MFU | to its defaults | to its best |"
    yield "|---|---|---|---|---|---|---|"
    for name, values in rates.items():
        used = medians[name] * flops
        mfu = f"{used / peak:.1%}" if peak else "-"
        ratios = (
            [f"{medians[name] / median:.2f} x" for median in (medians[DEFAULTS], max(theirs))]
            if theirs
            else ["-", "-"]
        )
        yield (
            f"| {name} | {medians[name]:,.0f} | {min(values):,.0f} to {max(values):,.0f} | {used / 1e12:.3f} "
            f"| {mfu} | {ratios[0]} | {ratios[1]} |"
        )


def config_of(options: argparse.Namespace) -> ModelConfig:
    is_modern = options.architecture == "modernbert"
    return ModelConfig(
        architecture=options.architecture,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        intermediate_size=options.hidden * 3 // 2 if is_modern else 4 * options.hidden,
        max_position_embeddings=max(512, options.length),
        layer_norm_eps=1e-5 if is_modern else 1e-12,
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.dropout,
        compile=options.compile,
    )


def batches_for(options: argparse.Namespace, folder: Path) -> list[Batch]:
    size = (options.rows, options.length, options.steps)
    if options.dataset:
        return batches_of_rows(options.dataset, *size, packing=options.kind == "packed")
    text = plain_jsonl(options.text, folder / "text.jsonl", 20_000_000)
    prepare(
        PrepareConfig(
            output=str(folder / "dataset"),
            sources={"text": (str(text),)},
            vocab_size=options.vocab_size,
            num_processes=os.cpu_count() or 1,
        )
    )
    if options.kind == "paragraphs":
        return batches_of_paragraphs(folder / "dataset", text, *size)
    return batches_of_rows(folder / "dataset", *size, packing=options.kind == "packed")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("text", nargs="*", help=".txt, .jsonl or .parquet files, also compressed")
    parser.add_argument("--dataset", type=Path, help="prepared already, instead of text")
    parser.add_argument("--length", type=int, default=128, help="slots of a row")
    parser.add_argument("--rows", type=int, default=32, help="of a batch")
    parser.add_argument(
        "--steps", type=int, default=7, help="of each way, the first two not counted"
    )
    kinds = ("pairs", "paragraphs", "packed")
    parser.add_argument("--kind", choices=kinds, default="pairs", help="of rows (default: pairs)")
    parser.add_argument("--architecture", choices=get_args(Architecture), default="bert")
    parser.add_argument(
        "--deepspeed", type=Path, help="a JSON of ds_configs: ours under DeepSpeed, too"
    )
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=30000)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--backends", nargs="+", default=["auto"], help="of model.attention")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], help="of ours")
    parser.add_argument("--compile", action="store_true", help="our layers, by torch.compile")
    options = parser.parse_args()
    if bool(options.text) == bool(options.dataset):
        parser.error("give either text or --dataset")
    if options.dataset:
        options.vocab_size = Dataset.open(options.dataset).vocab_size
        if options.kind == "paragraphs":
            parser.error("--kind paragraphs needs text")
    return options


def main() -> None:
    options = parse_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = config_of(options)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    print(
        f"{name or platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {packages}"
    )
    with tempfile.TemporaryDirectory(prefix="cloze-bench-") as folder:
        batches = batches_for(options, Path(folder))
    print(f"\n{options.layers} layers of {options.hidden}, {options.rows} rows of {options.length} slots, "
          f"{fill(batches):.0%} of them filled, dropout {options.dropout}\n")  # fmt: skip
    ways = list(ways_of(options, config, device))
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
