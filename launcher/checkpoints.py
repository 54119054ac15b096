"""`cloze checkpoints list|verify|convert`: checkpoints of a run, whether they are whole, and those of others.

cloze checkpoints list RUN [--verify]
cloze checkpoints verify RUN_OR_CHECKPOINT          status 1 when one is damaged
cloze checkpoints convert DEEPSPEED_FOLDER NEW_RUN --preset PRESET [key=value]
"""

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from launcher.checkpoint_facts import CheckpointFacts, facts_of
from launcher.tables import bytes_text, text_table
from trainer.checkpoint_files import list_checkpoints, problems_of
from trainer.config import load_config

WHOLE, DAMAGED = "whole", "DAMAGED"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="step, time, size, tokens of each")
    listing.add_argument("run", type=Path, help="folder of the run")
    listing.add_argument("--verify", action="store_true", help="read every byte, and compare")
    listing.add_argument("--json", action="store_true", help="for programs")
    verify = actions.add_parser("verify", help="compare all hashes; status 1 if any differs")
    verify.add_argument("source", type=Path, help="run, or checkpoint")
    convert = actions.add_parser("convert", help="DeepSpeed's own checkpoint -> a new run")
    convert.add_argument("source", type=Path, help="folder of save_checkpoint, or a tag's in it")
    convert.add_argument("target", type=Path, help="folder of the new run")
    convert.add_argument("--preset", type=Path, required=True, help="of the new run")
    convert.add_argument("overrides", nargs="*", help="of the preset: key=value")


def run(options: argparse.Namespace) -> int:
    """0, or 1 where a checkpoint is damaged. ValueError where there is none."""
    if options.action == "verify":
        return _verify(options.source)
    if options.action == "convert":
        return _convert(options)
    return _list(options.run, verify=options.verify, as_json=options.json)


def _verify(source: Path) -> int:
    folders = [source] if (source / "MANIFEST.json").exists() else list_checkpoints(source)
    if not folders:
        raise ValueError(f"{source} is neither a checkpoint nor a run with one")
    damaged = 0
    for folder, problems in zip(folders, _problems(folders), strict=True):
        damaged += bool(problems)
        print(f"{folder}: {DAMAGED if problems else WHOLE}")
        for problem in problems:
            print(f"  {problem}")
    return int(damaged > 0)


def _convert(options: argparse.Namespace) -> int:
    from launcher.convert import convert  # takes seconds, and the others do without

    config = load_config(options.preset, [*options.overrides, f"dir={options.target}"])
    done = convert(options.source, options.target, config)
    command = ["cloze", "train", str(options.preset), *options.overrides, f"dir={options.target}"]
    print(
        f"{done.checkpoint}: {done.num_parameters:,} parameters with their moments, step {done.step}; its "
        f"names were {done.names}\nthe run goes on from there, with its data from the beginning:\n"
        f"  {shlex.join(command)}"
    )
    return 0


def _problems(folders: Sequence[Path]) -> list[list[str]]:
    with ThreadPoolExecutor() as threads:  # hashing leaves Python's lock
        return list(threads.map(problems_of, folders))


def _list(run: Path, *, verify: bool, as_json: bool) -> int:
    folders = list_checkpoints(run)
    if not folders:
        raise ValueError(f"{run} has no checkpoints")
    verdicts = _problems(folders) if verify else [None] * len(folders)
    found: list[CheckpointFacts | str] = [_facts(folder) for folder in folders]
    if as_json:
        rows = [
            {"name": folder.name, **({"problems": problems} if verify else {}), **_as_json(facts)}
            for folder, problems, facts in zip(folders, verdicts, found, strict=True)
        ]
        print(json.dumps(rows, indent=1))
    else:
        print(_table(folders, found, verdicts))
    bad = [text for problems in verdicts for text in problems or ()]
    bad += [facts for facts in found if isinstance(facts, str) and facts not in bad]
    if bad and not as_json:
        print("\n".join(["", *bad]))
    return int(bool(bad))


def _facts(folder: Path) -> CheckpointFacts | str:
    """What is known of it, or why nothing is."""
    try:
        return facts_of(folder)
    except (OSError, ValueError) as error:
        return str(error)


def _as_json(facts: CheckpointFacts | str) -> dict[str, object]:
    if isinstance(facts, str):
        return {"problem": facts}
    return {name: value for name, value in asdict(facts).items() if value is not None}


def _table(
    folders: Sequence[Path],
    found: Sequence[CheckpointFacts | str],
    verdicts: Sequence[list[str] | None],
) -> str:
    rows = []
    for folder, facts, problems in zip(folders, found, verdicts, strict=True):
        verdict = () if problems is None else (DAMAGED if problems else WHOLE,)
        if isinstance(facts, str):
            rows.append((folder.name, *[""] * 6, *verdict))
            continue
        rows.append(
            (
                folder.name,
                f"{facts.step:,}",
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts.time)),
                bytes_text(facts.num_bytes),
                str(facts.num_files),
                "" if facts.num_tokens is None else f"{facts.num_tokens:,}",
                "" if facts.world_size is None else str(facts.world_size),
                *verdict,
            )
        )
    header = ("checkpoint", "step", "written", "size", "files", "tokens", "ranks")
    return text_table((*header, *(("verdict",) if verdicts[0] is not None else ())), rows)
