"""A rank of tests/test_trainer_partition.py: builds a model at ZeRO 3 and steps it, and tells what it held."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from test_model_bert import packed_batch, total

from bench.memory import live_bytes
from model.config import ModelConfig
from model.weights import build, build_empty, fresh_weights, parameter_shapes
from trainer import engine as engines
from trainer.ds import read_deepspeed_json, resolve
from trainer.engine import NamedState, build_engine, set_accumulation, start_world, step, stop_world
from trainer.optim import parameter_groups
from trainer.optim_config import OptimConfig

VOCAB = 200
CONFIG = ModelConfig(
    architecture="modernbert", hidden_size=256, num_hidden_layers=12, num_attention_heads=4,
    intermediate_size=688, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    layer_norm_eps=1e-5,
)  # fmt: skip


def main(output: Path) -> None:
    torch.set_num_threads(1)
    world = start_world()
    deepspeed = resolve(
        read_deepspeed_json(Path("ds_configs/zero3.json")),
        micro_batch_size=1,
        accumulation=1,
        clip_norm=1.0,
        precision="fp32",
    )
    deepspeed["zero_optimization"]["reduce_bucket_size"] = 1_000_000  # else a buffer of 200 MB
    held = {"build": 0, "load": 0}
    begin = live_bytes()
    number = 0
    fill = torch.nn.init.zeros_

    def watched_fill(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal number
        number += 1
        if number % 6 == 0:
            held["build"] = max(held["build"], live_bytes() - begin)
        return fill(tensor)

    def watched_weights():
        for index, (name, value) in enumerate(fresh_weights(CONFIG, VOCAB, seed=3)):
            if index % 12 == 0:
                held["load"] = max(held["load"], live_bytes() - begin)
            yield name, value

    engines.torch.nn.init.zeros_ = watched_fill
    model = build_empty(CONFIG, VOCAB)
    engine = build_engine(model, watched_weights(), OptimConfig(), deepspeed, world.device)
    engines.torch.nn.init.zeros_ = fill
    state = NamedState(engine)
    expected = dict(fresh_weights(CONFIG, VOCAB, seed=3))
    wrong = [
        name for name, want in expected.items() if not torch.equal(state.get(name, "master"), want)
    ]
    batch = packed_batch([[40, 30], [64]], row_length=72)
    losses = []
    for _ in range(2):
        set_accumulation(engine, 0, 1)
        found = engine(**batch)
        engine.backward(total(found), scale_wrt_gas=False)
        step(engine)
        losses.append(found["mlm"].loss_sum.item())
    twin = build(CONFIG, VOCAB, seed=3)
    groups = parameter_groups(model.named_parameters(), OptimConfig())
    decayed: Any = groups[0]["params"]
    result = {
        "num_parameters": sum(s.numel() for s in parameter_shapes(CONFIG, VOCAB).values()),
        "held_bytes": held,
        "wrong": wrong,
        "losses": losses,
        "twin_loss": twin(**batch)["mlm"].loss_sum.item(),
        "num_decayed": len(decayed),
        "num_matrices": sum(len(s) == 2 for s in parameter_shapes(CONFIG, VOCAB).values()),
    }
    Path(output, f"rank{world.rank}.json").write_text(json.dumps(result))
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
