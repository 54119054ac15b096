"""A preset file and `key=value` overrides in, one frozen, checked RunConfig out."""

import dataclasses
import itertools
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from data.lanes import DataConfig
from data.objectives import TASKS
from data.settings import read_settings
from data.transfer import redact
from model.config import COMPUTE_FIELDS, ModelConfig
from trainer.ds import suggestion
from trainer.guard import GuardConfig
from trainer.optim_config import OptimConfig
from trainer.phases import PhaseConfig, schedules, settings_at


@dataclass(frozen=True)
class RunConfig:
    """One pretraining run. Sizes are of the whole run, not of a process, unless they say so."""

    dir: str  # the run's folder: configuration, checkpoints, metrics, TensorBoard events
    steps: int  # optimizer steps of the whole run
    global_batch_size: int  # rows in an optimizer step, over all ranks
    micro_batch_size: int  # rows of one forward pass on one rank
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    deepspeed: str = "ds_configs/zero1.json"  # what DeepSpeed alone owns: stage, offload, buckets
    precision: Literal["bf16", "fp32"] = "bf16"  # bf16 computes in bf16 and keeps fp32 masters
    loss_weights: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # task -> weight; else 1
    phases: tuple[PhaseConfig, ...] = ()  # what changes at which step: row length, mixture, batch
    init_from: str | None = None  # Hugging Face folder of a BERT to start from; None: fresh weights
    seed: int = 1
    log_every: int = 10  # steps
    eval_every: int = 500  # steps; 0: only at the end
    eval_rows: int = 1024  # held-out rows of one evaluation
    save_every: int = 500  # steps; 0: only at the end
    keep_checkpoints: int = 3  # the newest ones; older are deleted
    keep_every: int = 0  # steps whose checkpoints are never deleted: every so many; 0: none
    verify_hf: Literal["logits", "weights"] = (
        "logits"  # hf/ of the last checkpoint: also by transformers
    )
    stuck_after_steps: int = (
        2000  # after warm-up: a task no better than guessing is warned of; 0: never
    )
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    hang_timeout_seconds: float = 300.0  # a rank that stands still so long is explained, and ended
    time_limit_minutes: float | None = None  # of one job: it saves and stops before

    def __post_init__(self) -> None:
        problems = []
        for name in ("steps", "global_batch_size", "micro_batch_size", "log_every", "eval_rows"):
            if getattr(self, name) < 1:
                problems.append(f"{name} {getattr(self, name)} is below 1")
        for name in ("eval_every", "save_every", "keep_every", "seed", "stuck_after_steps"):
            if getattr(self, name) < 0:
                problems.append(f"{name} {getattr(self, name)} is negative")
        if self.keep_checkpoints < 2:
            problems.append(
                f"keep_checkpoints {self.keep_checkpoints} is below 2: one may prove damaged"
            )
        if not self.dir:
            problems.append("dir is empty: name the folder of the run")
        problems += self._stopping_problems()
        problems += self._phase_problems()
        problems += self._schedule_problems()
        problems += self._loss_weight_problems()
        if problems:
            raise ValueError("; ".join(problems))

    def _stopping_problems(self) -> list[str]:
        problems = []
        if self.hang_timeout_seconds < 1:
            problems.append(f"hang_timeout_seconds {self.hang_timeout_seconds} is below 1")
        if self.time_limit_minutes is not None and self.time_limit_minutes <= 0:
            problems.append(f"time_limit_minutes {self.time_limit_minutes} is not above 0")
        if self.save_every and self.keep_every % self.save_every:
            problems.append(
                f"keep_every {self.keep_every} is not a multiple of save_every {self.save_every}"
            )
        return problems

    def _loss_weight_problems(self) -> list[str]:
        problems = []
        phases = {
            f"phase at step {phase.first_step}: ": phase.loss_weights for phase in self.phases
        }
        for where, weights in {"": self.loss_weights, **phases}.items():
            for task, weight in (weights or {}).items():
                if task not in TASKS:
                    problems.append(
                        f"{where}loss_weights.{task}: there is no such task, but {', '.join(TASKS)}"
                    )
                elif not weight >= 0:
                    problems.append(f"{where}loss_weights.{task} {weight} is negative")
        return problems

    def _schedule_problems(self) -> list[str]:
        problems = []
        for first_step, end, optim in schedules(self):
            where = f" of the phase at step {first_step}" if first_step else ""
            if optim.warmup_steps >= end - first_step:
                problems.append(
                    f"optim.warmup_steps {optim.warmup_steps}{where} is not below steps {end - first_step}"
                )
            elif optim.warmup_steps + optim.decay_steps > end - first_step:
                problems.append(
                    f"optim.warmup_steps {optim.warmup_steps} and decay_steps {optim.decay_steps}{where} "
                    f"are more than its {end - first_step} steps"
                )
        return problems

    def _phase_problems(self) -> list[str]:
        problems = []
        first_steps = [phase.first_step for phase in self.phases]
        if any(a >= b for a, b in itertools.pairwise([*first_steps, self.steps])):
            problems.append(
                f"phases begin at steps {first_steps}: they must ascend, and stay below steps {self.steps}"
            )
        for step in [0, *first_steps]:
            try:
                length = settings_at(self, step).data.sequence_length
            except ValueError as error:
                problems.append(f"phase at step {step}: {error}")
                continue
            if length > self.model.max_position_embeddings:
                problems.append(
                    f"data.sequence_length {length} is over model.max_position_embeddings "
                    f"{self.model.max_position_embeddings}" + (f" at step {step}" if step else "")
                )
        return problems


CREDENTIALS = (
    "name the host in ~/.netrc, or set the store's own variables (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS)"
)

# What may differ between the jobs of one run: it changes neither the rows nor, but for rounding, the curve.
FREE_TO_CHANGE = frozenset(
    {
        "dir", "deepspeed", "micro_batch_size", "log_every", "eval_every", "eval_rows", "save_every",
        "keep_checkpoints", "keep_every", "guard", "verify_hf", "hang_timeout_seconds", "time_limit_minutes",
        "stuck_after_steps", "data.path", "data.num_workers", "data.max_damaged_blocks", "data.storage",
        *(f"model.{name}" for name in COMPUTE_FIELDS),
    }
)  # fmt: skip
# What may differ from one phase to the next: the checkpoint's own record of its phases tells.
OF_A_PHASE = (
    "phases", "global_batch_size", "data.sequence_length", "data.packing", "data.masked_fraction",
    "data.weights", "data.objectives", "data.mask_token_share", "data.random_token_share",
)  # fmt: skip


def load_config(preset: Path, overrides: list[str]) -> RunConfig:
    """Read a YAML preset and apply `a.b=value` overrides.

    ValueError, all problems in one message: unreadable file, unknown or missing keys, wrong types,
    and whatever the sections themselves refuse.
    """
    wrong = [override for override in overrides if "=" not in override]
    if wrong:
        raise ValueError(
            f"overrides are key=value, e.g. optim.learning_rate=1e-4; got {_shown(wrong)}"
        )
    return config_from(read_settings(preset, "preset", overrides), source=str(preset))


def config_from(values: Any, source: str) -> RunConfig:
    """A RunConfig from plain nested dicts, checked."""
    problems: list[str] = []
    config = _build(RunConfig, values, "", problems)
    if problems or config is None:
        raise ValueError(f"{source}: " + "; ".join(problems))
    return _with_tasks(config, values, source)


def _with_tasks(config: RunConfig, values: Any, source: str) -> RunConfig:
    """The configuration with the heads that its objectives need: they follow from data.objectives."""
    tasks = settings_at(config, 0).data.mixture.tasks
    given = (values.get("model") or {}).get("tasks")
    if given is not None and tuple(given) != tasks:
        raise ValueError(
            f"{source}: model.tasks is {list(given)}, but data.objectives of the run and its phases ask for "
            f"{list(tasks)}: leave model.tasks out"
        )
    try:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, tasks=tasks))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _build(kind: type, values: Any, prefix: str, problems: list[str]) -> Any:
    """Build dataclass `kind` from `values`; None after adding what is wrong to `problems`."""
    if not isinstance(values, dict):
        problems.append(
            f"{prefix.rstrip('.') or 'the preset'} must be a mapping, got {_shown(values)}"
        )
        return None
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    before = len(problems)
    for key in values:
        if key not in fields:
            problems.append(f"unknown key {prefix}{key}{suggestion(str(key), list(fields))}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], prefix + name, problems)
        elif dataclasses.is_dataclass(hints[name]):
            arguments[name] = _build(
                typing.cast(type, hints[name]), {}, f"{prefix}{name}.", problems
            )
        elif field.default is field.default_factory is dataclasses.MISSING:
            problems.append(f"missing key {prefix}{name}")
    if len(problems) > before:
        return None
    try:
        return kind(**arguments)
    except ValueError as error:
        problems.append(str(error))
        return None


def _convert(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    """`value` as type `hint`, without guessing: 1 is a float, "1" is no number."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{name}.", problems)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            problems.append(f"{name} must be a list, got {_shown(value)}")
            return None
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{name}.{i}", problems) for i, v in enumerate(value))
    if not _matches(hint, value):
        problems.append(f"{name} must be {_describe(hint)}, got {_shown(value)}")
    elif isinstance(value, str) and redact(value) != value:
        problems.append(
            f"{name} {redact(value)} holds a password or a query, which would be written into config.yaml and "
            f"every checkpoint: {CREDENTIALS}"
        )
    elif isinstance(value, str) and not value.isprintable():
        problems.append(f"{name} is {value[:200]!r}, with characters that are not printable")
    else:
        return float(value) if hint is float else value
    return None


def _shown(value: Any) -> str:
    """A wrong value as a message may show it: short, and without the secrets that URLs hold."""
    text = re.sub(r"[a-zA-Z][a-zA-Z0-9+.-]*:/+[^\s'\"]*", lambda url: redact(url[0]), repr(value))
    return text if len(text) <= 200 else text[:200] + "..."


def _matches(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(choice, value) for choice in typing.get_args(hint))
    if origin is dict:
        key_hint, value_hint = typing.get_args(hint)
        return isinstance(value, dict) and all(
            _matches(key_hint, k) and _matches(value_hint, v) for k, v in value.items()
        )
    if hint is float:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and abs(value) < float("inf")
        )
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain dicts and lists, as YAML and JSON give them back."""
    values = dataclasses.asdict(config)
    model = {**values["model"], "tasks": list(values["model"]["tasks"])}
    return {**values, "phases": list(values["phases"]), "model": model}


def to_yaml(config: RunConfig) -> str:
    """YAML that `load_config` reads back to an equal RunConfig."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """'key: old -> new' for every setting that must stay the same over the jobs of a run."""
    # settings that are newer than a checkpoint had their defaults then
    defaults = {"optim": OptimConfig(), "model": ModelConfig(), "data": DataConfig(path="")}
    for section, default in defaults.items():
        old = {**old, section: dataclasses.asdict(default) | old[section]}
    old = {"loss_weights": {}, **old}
    old["model"]["tasks"] = list(old["model"]["tasks"])
    old_flat, new_flat = _with_rates(old), _with_rates(new)
    return [
        f"{key}: {old_flat.get(key)!r} -> {new_flat.get(key)!r}"
        for key in sorted(old_flat.keys() | new_flat.keys())
        if not any(f"{key}.".startswith(f"{name}.") for name in FREE_TO_CHANGE.union(OF_A_PHASE))
        and old_flat.get(key) != new_flat.get(key)
    ]


def _with_rates(values: dict[str, Any]) -> dict[str, Any]:
    """Flat, and the learning rates and loss weights of phases apart from what else of them may change."""
    rates = [
        [phase[name] for name in ("first_step", "learning_rate", "warmup_steps")]
        for phase in values["phases"]
        if phase.get("learning_rate") is not None
    ]
    loss_weights = [
        [phase["first_step"], phase["loss_weights"]]
        for phase in values["phases"]
        if phase.get("loss_weights")
    ]
    flat = _flatten(values)
    return {
        **flat, "learning rates of phases": rates, "loss weights of phases": loss_weights,
    }  # fmt: skip


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
