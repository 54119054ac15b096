"""One of two real ranks: trains tiny models in DeepSpeed's engines, and saves as DeepSpeed does.

python -m torch.distributed.run --nproc-per-node 2 tests/deepspeed_worker.py FOLDER CASE...

Beside each checkpoint rank 0 writes what the engine held, tensor by tensor, for comparison.
"""

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file

from model.config import ModelConfig
from model.weights import build_empty, fresh_weights
from trainer.ds import resolve
from trainer.engine import NamedState, build_engine, start_world, step, stop_world
from trainer.optim import parameter_groups
from trainer.optim_config import OptimConfig

VOCAB_SIZE, STEPS = 360, 3
# Odd sizes do not divide by the ranks: ZeRO pads them.
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 65,
    "max_position_embeddings": 64, "attention": "eager",
}  # fmt: skip
ZERO = {"reduce_bucket_size": 50_000, "allgather_bucket_size": 50_000}
CASES = {
    "stage1-bf16": (1, "bf16", False),  # DeepSpeed's BF16_Optimizer
    "stage1-fp32": (1, "fp32", False),
    "stage2-bf16": (2, "bf16", False),
    "stage3-bf16": (3, "bf16", False),
    "stage2-hf": (2, "bf16", True),
    "stage0-fp32": (0, "fp32", False),
}


def configuration(stage: int, precision: Any) -> dict[str, Any]:
    zero = {"stage": stage, **(ZERO if stage else {})}
    if stage == 3:
        zero = {"stage": 3, "sub_group_size": 5_000, "stage3_param_persistence_threshold": 0}
    return resolve(
        {"zero_optimization": zero},
        micro_batch_size=2,
        accumulation=1,
        clip_norm=1.0,
        precision=precision,
    )


def ours(config: dict[str, Any], device: torch.device) -> Any:
    model = ModelConfig(**SHAPE)
    empty = build_empty(model, VOCAB_SIZE)
    weights = fresh_weights(model, VOCAB_SIZE, seed=5)
    return build_engine(empty, weights, OptimConfig(learning_rate=1e-2), config, device)


def of_hugging_face(config: dict[str, Any]) -> Any:
    from transformers import BertConfig, BertForPreTraining

    shape = {k: v for k, v in SHAPE.items() if k != "attention"}
    torch.manual_seed(5)
    model = BertForPreTraining(BertConfig(vocab_size=VOCAB_SIZE, **shape)).to(torch.bfloat16)
    groups = parameter_groups(model.named_parameters(), OptimConfig(weight_decay=0.01))
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def loss_of(engine: Any, rank: int, number: int, *, hugging_face: bool) -> torch.Tensor:
    draw = torch.Generator().manual_seed(100 * rank + number)
    ids = torch.randint(5, VOCAB_SIZE, (2, 16), generator=draw)
    if hugging_face:
        return engine(input_ids=ids, labels=ids, next_sentence_label=torch.tensor([0, 1])).loss
    zeros, masked = torch.zeros_like(ids), torch.arange(0, 32, 3)
    losses = engine(
        input_ids=ids,
        token_type_ids=zeros,
        position_ids=torch.arange(16).expand(2, 16).contiguous(),
        sequence_ids=zeros,
        targets={
            "mlm": (masked, ids.view(-1)[masked]),
            "nsp": (torch.tensor([0, 16]), torch.tensor([0, 1])),
        },
    )
    return losses["mlm"].loss_sum / 11 + losses["nsp"].loss_sum / 2


def run_case(folder: Path, case: str, world: Any) -> None:
    stage, precision, hugging_face = CASES[case]
    config = configuration(stage, precision)
    engine = of_hugging_face(config) if hugging_face else ours(config, world.device)
    for number in range(STEPS):
        engine.backward(loss_of(engine, world.rank, number, hugging_face=hugging_face))
        step(engine)
    named = NamedState(engine)
    if stage in (1, 2) and hasattr(named.wrapper, "_lazy_init_hp_params_optimizer_state"):
        named.wrapper._hp_optimizer_states_linked = (
            False  # else only those of the first group are found
        )
        named.wrapper._lazy_init_hp_params_optimizer_state()
    held = {
        f"{part}/{name}": named.get(name, part).cpu().contiguous()
        for name in named.parameters
        for part in named.parts(name)
    }
    facts = {"optimizer_step": named.optimizer_step}
    engine.save_checkpoint(str(folder / case), client_state={"note": "ours", "numbers": [1, 2.5]})
    if world.is_main:
        save_file(held, folder / f"{case}.safetensors")
        (folder / f"{case}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    place, world_here = Path(sys.argv[1]), start_world()
    for name_of_case in sys.argv[2:]:
        run_case(place, name_of_case, world_here)
    stop_world()
