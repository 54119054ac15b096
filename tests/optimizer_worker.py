"""A rank of tests/test_trainer_optimizers.py: every optimizer at every ZeRO stage beside its reference."""

import gc
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from optimizer_reference import Reference
from test_model_bert import packed_batch, total

from model.config import ModelConfig
from model.weights import build, build_empty, fresh_weights, stacked_matrices
from trainer.ds import read_deepspeed_json, resolve
from trainer.engine import (
    NamedState,
    build_engine,
    set_accumulation,
    set_learning_rate,
    start_world,
    step,
    stop_world,
)
from trainer.optim_config import OptimConfig
from trainer.world import World

VOCAB = 60
BERT = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    attention="eager",
)  # fmt: skip
MODERN = replace(BERT, architecture="modernbert", layer_norm_eps=1e-5)
LAMB = OptimConfig(name="lamb", learning_rate=0.02, weight_decay=0.01, ema_decay=0.9)
MUON = OptimConfig(name="muon", learning_rate=0.02, weight_decay=0.1, clip_norm=0.5)
ADAMW = OptimConfig(learning_rate=1e-3, ema_decay=0.5)
RATES = (0.5, 1.0, 0.7, 0.2)  # of the learning rate, step by step
SUBGROUPS = {"sub_group_size": 1500}
STAGES = (
    ("zero0", "fp32"), ("zero1", "fp32"), ("zero2", "fp32"), ("zero3", "fp32"),
    ("zero2_offload", "fp32"), ("zero3_offload", "fp32"), ("zero1", "bf16"), ("zero3", "bf16"),
)  # fmt: skip
SCENARIOS: list[tuple[str, ModelConfig, OptimConfig, str, str, dict[str, Any]]] = [
    *(
        (f"{optim.name} {stage} {precision}", BERT, optim, stage, precision, {})
        for optim in (LAMB, MUON)
        for stage, precision in STAGES
    ),
    ("lamb zero3 subgroups", BERT, LAMB, "zero3", "fp32", SUBGROUPS),
    ("muon zero3 subgroups", MODERN, MUON, "zero3", "fp32", SUBGROUPS),
    ("adamw zero3 fp32", BERT, ADAMW, "zero3", "fp32", {}),
]


def run(config: ModelConfig, optim: OptimConfig, deepspeed: dict, world: World) -> dict[str, float]:
    """Largest relative errors after the steps: of masters, of their change, and of their average."""
    dtype = torch.bfloat16 if "bf16" in deepspeed else torch.float32
    batch = packed_batch([[9, 7, 4], [24], [5, 13]], row_length=24)
    weights = dict(fresh_weights(config, VOCAB, seed=3))
    model = build(config, VOCAB, seed=3).to(dtype)
    engine = build_engine(
        build_empty(config, VOCAB), iter(weights.items()), optim, deepspeed, world.device
    )
    reference = Reference(weights, optim, stacked_matrices(config), dtype)
    for number in RATES:
        rate = optim.learning_rate * number
        set_learning_rate(engine, rate)
        set_accumulation(engine, 0, 1)
        losses = engine(**batch)
        engine.backward(total(losses), scale_wrt_gas=False)
        step(engine)
        losses = model(**batch)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total(losses), parameters)
        reference.step(dict(zip(names, gradients, strict=True)), rate)
        with torch.no_grad():
            for name, value in reference.whole(reference.weights).items():
                model.get_parameter(name).copy_(value)
    return errors(NamedState(engine), reference, weights)


def errors(state: NamedState, reference: Reference, before: dict) -> dict[str, float]:
    found = {"master": 0.0, "change": 0.0, "ema": 0.0}
    masters, averages = reference.whole(reference.weights), reference.whole(reference.average)
    for name, want in masters.items():
        difference = (state.get(name, "master") - want).norm()
        found["master"] = max(found["master"], float(difference / want.norm().clamp(min=1e-3)))
        found["change"] = max(found["change"], float(difference / (want - before[name]).norm()))
        if "ema" in state.parts(name):
            error = (state.get(name, "ema") - averages[name]).norm()
            found["ema"] = max(found["ema"], float(error / averages[name].norm().clamp(min=1e-3)))
    return found


def deepspeed_of(stage: str, precision: Any, optim: OptimConfig, **changes: Any) -> dict[str, Any]:
    config = resolve(
        read_deepspeed_json(Path(f"ds_configs/{stage}.json")),
        micro_batch_size=1,
        accumulation=1,
        clip_norm=optim.clip_norm,
        precision=precision,
    )
    small = {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000}
    config["zero_optimization"] |= {**small, **changes} if stage != "zero0" else {}
    return config


def main(output: Path, wanted: str) -> None:
    torch.set_num_threads(1)
    world = start_world()
    found = {}
    for name, config, optim, stage, precision, changes in SCENARIOS:
        if re.search(wanted, name):
            deepspeed = deepspeed_of(stage, precision, optim, **changes)
            found[name] = run(config, optim, deepspeed, world)
            gc.collect()
    if world.is_main:
        output.write_text(json.dumps(found, indent=1))
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
