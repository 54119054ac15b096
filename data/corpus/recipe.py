"""A recipe's YAML in, one frozen, checked Recipe out: which files, which steps, which copies, where it runs."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from data.corpus.boilerplate import RemoveBoilerplate
from data.corpus.decontaminate import Decontaminate
from data.corpus.duplicates import DedupConfig
from data.corpus.language import IdentifyLanguage
from data.corpus.markup import RemoveMarkup
from data.corpus.minhash import MinHashConfig
from data.corpus.mojibake import RepairMojibake
from data.corpus.normalise import Normalise
from data.corpus.pii import MaskPII
from data.corpus.quality import Quality
from data.corpus.steps import Step
from data.settings import read_settings

STEPS: dict[str, Callable[..., Step]] = {
    "repair_mojibake": RepairMojibake,
    "normalise": Normalise,
    "remove_markup": RemoveMarkup,
    "remove_boilerplate": RemoveBoilerplate,
    "identify_language": IdentifyLanguage,
    "quality": Quality,
    "mask_pii": MaskPII,
    "decontaminate": Decontaminate,
}
EXECUTORS = ("local", "slurm", "ray")
SOURCE_NAME = re.compile(r"[a-z0-9_]{1,40}")


@dataclass(frozen=True)
class SourceConfig:
    """Where a source's documents lie, and how its records become documents."""

    files: tuple[str, ...]  # files, folders, globs; suffixes: data/corpus/readers.py
    text_field: str = "text"  # of .jsonl and .parquet, and of .json members of a .tar
    id_field: str = "id"
    txt_documents: str = "file"  # "file", or "blank_line": what one document of a .txt file is
    html: bool = False  # the text field holds HTML: its main text is taken
    label_field: str | None = None  # a field with the truth about a document, for the report


@dataclass(frozen=True)
class ExecutorConfig:
    """Where the work is done. No part of what decides the output."""

    kind: str = "local"
    workers: int = 0  # tasks at a time; 0: one for each core of this machine
    time: str = "12:00:00"  # of a Slurm task
    partition: str = "cpu"  # of Slurm
    mem_per_cpu_gb: int = 4  # of Slurm and Ray
    sbatch: dict[str, Any] = field(default_factory=dict)  # further options of sbatch: account, qos


@dataclass(frozen=True)
class Recipe:
    output: str
    sources: dict[str, SourceConfig]
    steps: tuple[Step, ...]
    dedup: DedupConfig | None
    stop_on_problems: bool  # else records that cannot be read are counted and reported
    executor: ExecutorConfig
    truth: dict[str, str]  # label -> the step that should find it, for the report
    values: dict[str, Any]  # the recipe as it was written, but for the executor: decides the output


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a recipe and apply `a.b=value` overrides. ValueError with all problems in one message."""
    return recipe_from(read_settings(path, "recipe", overrides), str(path))


def recipe_from(values: Any, place: str) -> Recipe:
    """A Recipe from plain nested values. ValueError naming `place` and every problem."""
    if not isinstance(values, dict):
        raise ValueError(f"{place}: a mapping is wanted")
    problems = _unknown(
        "", values, {"output", "sources", "steps", "dedup", "stop_on_problems", "executor", "truth"}
    )
    problems += [f"missing: {name}" for name in ("output", "sources") if not values.get(name)]
    sources = _sources(values.get("sources") or {}, problems)
    steps = _steps(values.get("steps") or [], problems)
    dedup = _dedup(values.get("dedup"), problems)
    executor = _build(ExecutorConfig, values.get("executor") or {}, "executor", problems)
    if executor is not None and executor.kind not in EXECUTORS:
        problems.append(f"executor.kind is {executor.kind!r}; choose one of {', '.join(EXECUTORS)}")
    truth = values.get("truth") or {}
    known = {*(step.name for step in steps), "copies"}
    problems += [
        f"truth.{label} is {step!r}: none of the steps {', '.join(sorted(known))}"
        for label, step in truth.items()
        if step not in known
    ]
    if problems or executor is None:
        raise ValueError(f"{place}: " + "; ".join(problems))
    return Recipe(
        output=str(values["output"]),
        sources=sources,
        steps=steps,
        dedup=dedup,
        stop_on_problems=bool(values.get("stop_on_problems", False)),
        executor=executor,
        truth=truth,
        values={
            name: value for name, value in values.items() if name not in ("executor", "output")
        },
    )


def _sources(values: dict[str, Any], problems: list[str]) -> dict[str, SourceConfig]:
    sources = {}
    for name, value in values.items():
        if not SOURCE_NAME.fullmatch(str(name)):
            problems.append(f"sources.{name}: use 1 to 40 of a-z, 0-9 and _ as name")
        if isinstance(value, str | list):
            value = {"files": value}
        if isinstance(value, dict) and isinstance(value.get("files"), str):
            value = {**value, "files": [value["files"]]}
        source = _build(SourceConfig, value, f"sources.{name}", problems)
        if source is None:
            continue
        if source.txt_documents not in ("file", "blank_line"):
            problems.append(f"sources.{name}.txt_documents is {source.txt_documents!r}")
        sources[str(name)] = source
    return sources


def _steps(values: Any, problems: list[str]) -> tuple[Step, ...]:
    """Each entry is a name, or a mapping of one name to its options."""
    steps: list[Step] = []
    for entry in values if isinstance(values, list) else []:
        name, options = entry, {}
        if isinstance(entry, dict) and len(entry) == 1:
            ((name, options),) = entry.items()
        if name not in STEPS:
            problems.append(f"steps: {name!r} is none of {', '.join(STEPS)}")
            continue
        made = _build(STEPS[name], options or {}, f"steps.{name}", problems)
        if made is not None:
            steps.append(made)
    if not isinstance(values, list):
        problems.append("steps: a list is wanted")
    names = [step.name for step in steps]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        problems.append(f"steps {twice} occur more than once")
    return tuple(steps)


def _dedup(value: Any, problems: list[str]) -> DedupConfig | None:
    """false or nothing: none; `near` may be true, false, or the settings of MinHash."""
    if not value:
        return None
    value = {} if value is True else value
    if not isinstance(value, dict):
        problems.append(f"dedup is {value!r}: a mapping is wanted")
        return None
    near = value.get("near", True)
    minhash = _build(MinHashConfig, near if isinstance(near, dict) else {}, "dedup.near", problems)
    others = {name: v for name, v in value.items() if name != "near"}
    return _build(
        DedupConfig, {**others, "near": bool(near), "minhash": minhash}, "dedup", problems
    )


def _build(kind: Callable[..., Any], values: Any, place: str, problems: list[str]) -> Any:
    """`kind(**values)` with lists as tuples; None after adding what is wrong to `problems`."""
    if not isinstance(values, dict):
        problems.append(f"{place}: a mapping is wanted, not {values!r}")
        return None
    known = {f.name for f in fields(kind)} if isinstance(kind, type) else set()  # pyright: ignore[reportArgumentType]
    if unknown := _unknown(f"{place}.", values, known):
        problems += unknown
        return None
    arguments = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        problems.append(f"{place}: {error}")
        return None


def _unknown(prefix: str, values: dict[str, Any], known: set[str]) -> list[str]:
    return [
        f"unknown key {prefix}{key}; known: {', '.join(sorted(known))}"
        for key in values
        if key not in known
    ]
