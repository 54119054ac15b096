"""A preset in, the memory of a rank at ZeRO 3 out: predicted for its own size, and measured on a narrower twin.

    python -m bench.memory configs/modern_10b.yaml --width 512 --processes 2

The twin has the preset's depth, architecture and size of heads. It is built, divided and really stepped by as
many processes as asked for, on CPUs, in bf16.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from model.config import ModelConfig
from model.flops import num_parameters
from model.weights import build_empty, fresh_weights, parameter_shapes
from trainer.config import load_config
from trainer.ds import read_deepspeed_json, resolve
from trainer.memory import state_bytes
from trainer.optim import state_numel

VOCAB = 4096
BUCKET = (
    500_000  # numbers: DeepSpeed's buffers, which have a fixed size, stay out of the comparison
)
STEPS = 2


def twin_of(config: ModelConfig, width: int) -> ModelConfig:
    """The same depth, and the same ratios, at another width."""
    return replace(
        config,
        hidden_size=width,
        num_attention_heads=max(1, width // (config.hidden_size // config.num_attention_heads)),
        intermediate_size=config.intermediate_size * width // config.hidden_size // 8 * 8,
        max_position_embeddings=128,
        attention="auto",
    )


def live_bytes() -> int:
    """Memory of all tensors that exist in this process."""
    gc.collect()
    tensors = (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def be_a_rank(preset: Path, width: int, output: Path) -> None:
    from trainer.engine import build_engine, set_accumulation, start_world, step, stop_world

    torch.set_num_threads(1)
    world = start_world()
    run = load_config(preset, [])
    config = twin_of(run.model, width)
    deepspeed = resolve(
        read_deepspeed_json(Path(run.deepspeed)),
        micro_batch_size=1,
        accumulation=1,
        clip_norm=1.0,
        precision="bf16",
    )
    for name in ("reduce_bucket_size", "stage3_prefetch_bucket_size"):
        deepspeed["zero_optimization"][name] = BUCKET
    before, peak_before = live_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = fresh_weights(config, VOCAB, seed=1)
    engine = build_engine(build_empty(config, VOCAB), weights, run.optim, deepspeed, world.device)
    built = live_bytes() - before
    losses = []
    slots = torch.arange(128)[None]
    for number in range(STEPS):
        set_accumulation(engine, 0, 1)
        found = engine(
            input_ids=(slots * 31 + number) % VOCAB,
            token_type_ids=slots * 0,
            position_ids=slots,
            sequence_ids=slots * 0,
            targets={
                "mlm": (slots[0, 1::7], slots[0, 1::7] * 31 % VOCAB),
                "nsp": (slots[0, :1], slots[0, :1]),
            },
        )
        loss = found["mlm"].loss_sum + found["nsp"].loss_sum
        engine.backward(loss, scale_wrt_gas=False)
        step(engine)
        losses.append(found["mlm"].loss_sum.item())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before
    result = {
        "built": built,
        "stepped": live_bytes() - before,
        "peak": peak * 1024,
        "losses": losses,
    }
    (output / f"{world.rank}.json").write_text(json.dumps(result))
    stop_world()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("preset", type=Path)
    parser.add_argument("--width", type=int, default=512, help="hidden size of the twin")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=131072, help="of the prediction")
    options = parser.parse_args()
    if "RANK" in os.environ:
        be_a_rank(options.preset, options.width, Path(os.environ["CLOZE_BENCH_OUTPUT"]))
        return
    run = load_config(options.preset, [])
    whole = run.model
    shapes = parameter_shapes(whole, options.vocab_size)
    number, num_state = num_parameters(whole, options.vocab_size), state_numel(shapes, run.optim)
    print(f"{options.preset}: {number:,} parameters with a vocabulary of {options.vocab_size:,}\n")
    print("| ranks | state of a rank, GB, predicted |\n|---|---|")
    for ranks in (2, 8, 32, 128):
        predicted = state_bytes(number, world_size=ranks, precision="bf16", num_state=num_state)
        print(f"| {ranks} | {predicted / 1e9:.2f} |")
    twin = twin_of(whole, options.width)
    number = num_parameters(twin, VOCAB)
    num_state = state_numel(parameter_shapes(twin, VOCAB), run.optim)
    with tempfile.TemporaryDirectory(prefix="cloze-bench-") as folder:
        launch = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={options.processes}",
        ]
        arguments = ["-m", "bench.memory", str(options.preset), "--width", str(options.width)]
        subprocess.run(
            [sys.executable, *launch, *arguments],
            env={
                **os.environ,
                "CLOZE_BENCH_OUTPUT": folder,
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
            },
            stderr=subprocess.DEVNULL,
            check=True,
        )
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    predicted = state_bytes(
        number, world_size=options.processes, precision="bf16", num_state=num_state
    )
    print(f"\nTwin: {twin.num_hidden_layers} layers of {twin.hidden_size}, {number:,} parameters, "
          f"{options.processes} ranks, {STEPS} steps.\n")  # fmt: skip
    print(
        "| rank | state predicted, MB | measured when built | after steps | peak over start | losses |"
    )
    print("|---|---|---|---|---|---|")
    for rank, values in enumerate(found):
        losses = ", ".join(f"{loss:.2f}" for loss in values["losses"])
        cells = [predicted, values["built"], values["stepped"], values["peak"]]
        print(f"| {rank} | {' | '.join(f'{cell / 1e6:.0f}' for cell in cells)} | {losses} |")


if __name__ == "__main__":
    main()
