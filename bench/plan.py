"""Small models really trained in, what `cloze plan` predicts of them beside what was measured out.

    python -m bench.plan memory --processes 1 2 4
    python -m bench.plan time

memory: of one rank, at its peak in a step, for each ZeRO stage, offload, micro-batch and checkpointing.
time: the speed is measured at one setting, and the step's time foretold for others.
All on CPUs, with gloo. A rank's peak is the bytes of all its tensors; torch's profiler tells.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launcher.activation_memory import Batch
from launcher.cost_model import Links, step_time, update_bytes
from launcher.memory_plan import Memory, Rank, memory_of, zero_of
from model.config import ModelConfig
from model.flops import attended_pairs, flops_per_step
from trainer.ds import read_deepspeed_json
from trainer.optim_config import OptimConfig

VOCAB, LENGTH, MASKED_EVERY = 8192, 128, 7
MODEL = ModelConfig(
    hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
    max_position_embeddings=LENGTH,
)  # fmt: skip
MODELS = {
    "bert": MODEL,
    "modernbert": replace(MODEL, architecture="modernbert", layer_norm_eps=1e-5),
    "bert-wider": replace(
        MODEL, hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536
    ),
}
BUCKET = 1_000_000  # numbers: those of ds_configs are larger than this model
STAGES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
# rows, accumulation, checkpointing
SETTINGS = (
    (4, 1, "none"), (16, 1, "none"), (16, 2, "none"), (16, 1, "full"), (16, 1, "selective"),
)  # fmt: skip
TIMED = ((4, 1, 4), (8, 1, 4), (16, 1, 4), (8, 4, 4), (8, 1, 8))  # rows, accumulation, layers
REFERENCE = (8, 2, 4)  # what the others are foretold from
REPEATED = 9


def deepspeed_json(stage: str) -> dict[str, Any]:
    """One of ds_configs, with buckets that fit the small model."""
    config = read_deepspeed_json(Path(f"ds_configs/{stage}.json"))
    for name in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        if name in config["zero_optimization"]:
            config["zero_optimization"][name] = BUCKET
    return config


def predicted(case: dict[str, Any], setting: tuple[int, int, str], processes: int) -> Memory:
    rows, accumulation, checkpointing = setting
    model = replace(MODELS[case["model"]], activation_checkpointing=checkpointing)
    batch = Batch(rows, LENGTH, 1 / MASKED_EVERY, case["precision"], "cpu")
    zero = zero_of(deepspeed_json(case["stage"]))
    return memory_of(Rank(model, VOCAB, OptimConfig(), zero, batch, processes, accumulation))


class Trained:
    """A small model in an engine, and steps of it."""

    def __init__(
        self, stage: str, precision: Any, model: ModelConfig, device: torch.device
    ) -> None:
        from model.weights import build_empty, fresh_weights
        from trainer.ds import resolve
        from trainer.engine import build_engine

        self.model = model
        config = resolve(
            deepspeed_json(stage), micro_batch_size=1, accumulation=1, clip_norm=1.0,
            precision=precision,
        )  # fmt: skip
        weights = fresh_weights(self.model, VOCAB, seed=1)
        empty = build_empty(self.model, VOCAB)
        self.engine = build_engine(empty, weights, OptimConfig(), config, device)

    def step(self, rows: int, accumulation: int) -> float:
        """One optimizer step. Returns the seconds of it that were the update."""
        from trainer.engine import set_accumulation, step

        began = time.perf_counter()
        for number in range(accumulation):
            set_accumulation(self.engine, number, accumulation)
            losses = self.engine(**inputs(rows))
            loss = losses["mlm"].loss_sum + losses["nsp"].loss_sum
            self.engine.backward(loss, scale_wrt_gas=False)
            del losses, loss
            began = time.perf_counter()
            step(self.engine)
        return time.perf_counter() - began


def inputs(rows: int) -> dict[str, Any]:
    """Rows that are one sequence each, every 7th token masked."""
    slots = torch.arange(rows * LENGTH).view(rows, LENGTH)
    masked = slots.flatten()[::MASKED_EVERY].contiguous()
    return {
        "input_ids": slots * 31 % VOCAB,
        "token_type_ids": slots * 0,
        "position_ids": torch.arange(LENGTH).expand(rows, LENGTH).contiguous(),
        "sequence_ids": slots * 0,
        "targets": {
            "mlm": (masked, masked * 31 % VOCAB),
            "nsp": (slots[:, 0].contiguous(), slots[:, 0] * 0),
        },
    }


def measure_memory(case: dict[str, Any], device: torch.device) -> list[list[int]]:
    """State and peak of this rank in each of SETTINGS, in bytes; of a step after two others."""
    from trainer.measured_memory import live_bytes, peak_bytes

    before = live_bytes()
    model = MODELS[case["model"]]
    trained = Trained(case["stage"], case["precision"], model, device)
    found = []
    for rows, accumulation, checkpointing in case["settings"]:
        trained.engine.module.config = replace(model, activation_checkpointing=checkpointing)
        for _ in range(2):
            trained.step(rows, accumulation)
        state = live_bytes() - before
        peak = peak_bytes(lambda r=rows, a=accumulation: trained.step(r, a)) - before
        found.append([state, peak])
    return found


def measure_time(case: dict[str, Any], device: torch.device) -> list[list[list[float]]]:
    """Of each setting, REPEATED times the seconds of forward and backward passes, and of the update.

    Turn about, so that whatever else the machine does falls on all of them alike.
    """
    depths = sorted({num_layers for *_, num_layers in case["timed"]})
    trained = {
        depth: Trained(case["stage"], "bf16", replace(MODEL, num_hidden_layers=depth), device)
        for depth in depths
    }
    found: list[list[list[float]]] = [[] for _ in case["timed"]]
    for turn in range(REPEATED + 1):
        for place, (rows, accumulation, depth) in zip(found, case["timed"], strict=True):
            began = time.perf_counter()
            update = trained[depth].step(rows, accumulation)
            if turn:  # the first warms up
                place.append([time.perf_counter() - began - update, update])
    return found


def launch(case: dict[str, Any], processes: int) -> list[Any]:
    """What every rank found, in real processes."""
    with tempfile.TemporaryDirectory(prefix="cloze-bench-") as folder:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [sys.executable, *start, "-m", "bench.plan"],
            env={
                **os.environ,
                "CLOZE_BENCH_CASE": json.dumps(case),
                "CLOZE_BENCH_OUTPUT": folder,
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def be_a_rank() -> None:
    from trainer.engine import start_world, stop_world

    torch.set_num_threads(1)
    device = start_world().device
    case = json.loads(os.environ["CLOZE_BENCH_CASE"])
    found = (measure_time if "timed" in case else measure_memory)(case, device)
    path = Path(os.environ["CLOZE_BENCH_OUTPUT"]) / f"{os.environ['RANK']}.json"
    path.write_text(json.dumps(found))
    stop_world()


def compare_memory(
    stage: str, processes: int, settings: Any, precision: str = "bf16", model: str = "bert"
) -> list[float]:
    """Prints a line for each setting; the dearest rank counts. Returns foretold over measured, less 1."""
    case = {
        "stage": stage,
        "precision": precision,
        "model": model,
        "settings": settings,
    }
    ranks, errors = launch(case, processes), []
    for number, setting in enumerate(settings):
        foretold = predicted(case, setting, processes)
        state, peak = (max(rank[number][which] for rank in ranks) for which in (0, 1))
        errors.append(foretold.total / peak - 1)
        rows, accumulation, checkpointing = setting
        cells = [foretold.state + foretold.host, state, foretold.total, peak]
        shown = " | ".join(f"{cell / 1e6:.1f}" for cell in cells)
        print(
            f"| {stage} {precision} {model} | {processes} | {rows} x {accumulation} | "
            f"{checkpointing} | {shown} | {errors[-1]:+.1%} |",
            flush=True,
        )
    return errors


def flops_of(setting: tuple[int, int, int]) -> int:
    rows, accumulation, num_layers = setting
    rows *= accumulation
    lengths = np.full(rows, LENGTH)
    return flops_per_step(
        replace(MODEL, num_hidden_layers=num_layers),
        VOCAB,
        num_tokens=rows * LENGTH,
        num_attended={None: attended_pairs(lengths, None)},
        num_labels={"mlm": -(-rows * LENGTH // MASKED_EVERY), "nsp": rows},
    )


def compare_time(stage: str, processes: int) -> list[float]:
    """From the speed in REFERENCE, the times of TIMED. Returns foretold over measured, less 1.

    Medians over turns; the speed is that of the same turn, for what else this machine does comes and goes.
    """
    steps = np.array(launch({"stage": stage, "timed": (REFERENCE, *TIMED)}, processes)[0])
    errors = []
    for setting, taken in zip(TIMED, steps[1:].sum(axis=-1), strict=True):
        foretold = np.array([seconds(stage, processes, setting, *turn) for turn in steps[0]])
        errors.append(float(np.median(foretold / taken)) - 1)
        rows, accumulation, num_layers = setting
        print(
            f"| {stage} | {processes} | {rows} x {accumulation} | {num_layers} | {np.median(foretold):.3f} | "
            f"{np.median(taken):.3f} | {taken.min():.3f} to {taken.max():.3f} | {errors[-1]:+.1%} |",
            flush=True,
        )
    return errors


def seconds(
    stage: str, processes: int, setting: tuple[int, int, int], computing: float, update: float
) -> float:
    """Of a step, foretold from the two parts of a step in REFERENCE.

    They tell what a rank computes in a second, and how fast its memory is in an update; what the ranks of
    one machine exchange is a part of both.
    """
    links = Links(processes, float("inf"), float("inf"))
    return step_time(
        rank_of(stage, processes, setting),
        flops_of(setting) * processes,
        flops_per_second=flops_of(REFERENCE) / computing,
        memory_per_second=update_bytes(rank_of(stage, processes, REFERENCE)) / update,
        links=links,
    ).exposed


def rank_of(stage: str, processes: int, setting: tuple[int, int, int]) -> Rank:
    rows, accumulation, num_layers = setting
    model = replace(MODEL, num_hidden_layers=num_layers)
    batch = Batch(rows, LENGTH, 1 / MASKED_EVERY, "bf16", "cpu")
    zero = zero_of(deepspeed_json(stage))
    return Rank(model, VOCAB, OptimConfig(), zero, batch, processes, accumulation)


def main() -> None:
    if "CLOZE_BENCH_CASE" in os.environ:
        be_a_rank()
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("memory", "time"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--model", choices=tuple(MODELS), default="bert")
    options = parser.parse_args()
    if options.what == "memory":
        print("| ZeRO | ranks | rows | checkpointing | state foretold, MB | measured | peak foretold | "
              "measured | error |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    else:
        print("| ZeRO | ranks | rows | layers | step foretold, s | measured, median | least to most | error |\n"
              "|---|---|---|---|---|---|---|---|")  # fmt: skip
    errors = []
    for stage in options.stages:
        for processes in options.processes:
            if options.what == "memory":
                errors += compare_memory(
                    stage, processes, SETTINGS, options.precision, options.model
                )
            else:
                errors += compare_time(stage, processes)
    sizes = [abs(error) for error in errors]
    print(
        f"\nError: median {statistics.median(sizes):.1%}, largest {max(sizes):.1%}, of {len(sizes)}."
    )


if __name__ == "__main__":
    main()
