"""A DeepSpeed JSON and the run's own numbers in, the configuration given to DeepSpeed out.

DeepSpeed ignores misspelt top-level keys and drops "auto" without a word, and it takes some
numbers from either side. So each number has one home: what DeepSpeed alone owns is in the JSON,
the rest in the preset, and a JSON that says more is refused.
"""

import difflib
import json
from pathlib import Path
from typing import Any, Literal

# Homes of what a JSON must not hold, by DeepSpeed's key.
IN_THE_PRESET = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "nothing: it follows from global_batch_size, micro_batch_size and ranks",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "steps_per_print": "log_every",
    "tensorboard": "nothing: the run writes its own",
    "checkpoint": "nothing: the run writes its own",
    "activation_checkpointing": "model.activation_checkpointing",
}
ALLOWED = (
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
)
ALLOWED_ZERO: dict[str, type] = {
    "stage": int,
    **dict.fromkeys(
        ("allgather_partitions", "overlap_comm", "reduce_scatter", "contiguous_gradients"), bool
    ),
    **dict.fromkeys(
        (
            "allgather_bucket_size", "reduce_bucket_size", "sub_group_size", "stage3_max_live_parameters",
            "stage3_max_reuse_distance", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
        ),
        int,
    ),
    "offload_optimizer": dict,
    "offload_param": dict,
}  # fmt: skip
SAID = {int: "a whole number from 0 on", bool: "true or false", dict: "an object"}


REFUSED_ZERO = {
    "round_robin_gradients": "DeepSpeed then looks for master weights where others are; leave it out",
}


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """The JSON of a preset. ValueError naming every key that is unknown, misplaced or "auto"."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"deepspeed: {path} does not exist") from None
    except (OSError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"deepspeed: {path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"deepspeed: {path} holds no JSON object")
    problems = _problems(config)
    if problems:
        raise ValueError(f"deepspeed: {path}: " + "; ".join(problems))
    return config


def _problems(config: dict[str, Any]) -> list[str]:
    problems = []
    for key, value in config.items():
        if key in IN_THE_PRESET:
            problems.append(f"{key!r} belongs to the preset (its home is {IN_THE_PRESET[key]})")
        elif key not in ALLOWED:
            problems.append(f"unknown key {key!r}{suggestion(key, ALLOWED)}")
        problems += [
            f'{path} is "auto", which DeepSpeed drops: write a value' for path in _autos(key, value)
        ]
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or type(stage) is not int or stage not in (0, 1, 2, 3):
        return [*problems, "zero_optimization.stage must be 0, 1, 2 or 3"]
    for key, value in zero.items():
        if key in REFUSED_ZERO:
            problems.append(f"zero_optimization.{key}: {REFUSED_ZERO[key]}")
        elif key not in ALLOWED_ZERO:
            problems.append(
                f"unknown key 'zero_optimization.{key}'{suggestion(key, list(ALLOWED_ZERO))}"
            )
        elif not _fits(ALLOWED_ZERO[key], value) and key != "stage" and value != "auto":
            problems.append(f"zero_optimization.{key} is {value!r}, not {SAID[ALLOWED_ZERO[key]]}")
    return problems + _offload_problems(zero)


def _fits(kind: type, value: Any) -> bool:
    """Numbers may be written as 5e8."""
    if kind is int:
        return type(value) in (int, float) and value >= 0 and value % 1 == 0
    return isinstance(value, kind)


def _offload_problems(zero: dict[str, Any]) -> list[str]:
    problems = []
    if "offload_param" in zero and zero["stage"] != 3:
        problems.append("zero_optimization.offload_param needs stage 3")
    if "offload_optimizer" in zero and zero["stage"] == 0:
        problems.append("zero_optimization.offload_optimizer needs stage 1, 2 or 3")
    offload = zero.get("offload_optimizer")
    if isinstance(offload, dict) and (
        offload.get("device") not in ("cpu", "none") or offload.get("ratio", 1) != 1
    ):
        problems.append(
            "zero_optimization.offload_optimizer goes to the device cpu, all of it: ratio is 1 if given"
        )
    return problems


def _autos(path: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in _autos(f"{path}.{key}", inner)]
    return [path] if value == "auto" else []


def suggestion(key: str, known: tuple[str, ...] | list[str]) -> str:
    """' (did you mean ...?)' for a misspelt key, or nothing."""
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def resolve(
    config: dict[str, Any],
    *,
    micro_batch_size: int,
    accumulation: int,
    clip_norm: float,
    precision: Literal["bf16", "fp32"],
) -> dict[str, Any]:
    """The whole configuration for `deepspeed.initialize`; `config` is left as it is.

    Gradients are summed in fp32 across micro-batches wherever DeepSpeed can (stages 1-3): its
    default, bf16, loses about 2 % of the gradient over 128 micro-batches.
    """
    resolved = {
        **config,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision == "bf16":
        resolved["bf16"] = {"enabled": True}
        if config["zero_optimization"]["stage"] > 0:
            resolved["data_types"] = {"grad_accum_dtype": "fp32"}
    return resolved
