"""Numbers of damages in, how many of them go unseen out: of a run's checkpoint, and of a dataset's shards.

    python tests/soak/silent_damage.py --folder /scratch/damage [--flips 10000 --cuts 1000 ...]

A small dataset and a run of a few steps are made. Then a bit of a file flips, a file is cut off, a page of 4 kB
(or what a small file has) becomes zeros, two files are exchanged: each at random, and undone. Checkpoints are
read by the check before a resume; shards as training reads them. Ends with 1 when one goes unseen.
"""

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from damage_support import KINDS, SILENT, damage_checkpoint, damage_dataset, files_of  # noqa: E402
from support import launch, tiny_preset, write_corpus  # noqa: E402

from data.prepare import PrepareConfig, prepare  # noqa: E402
from trainer.checkpoint_files import list_checkpoints  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    for kind, count in zip(KINDS, (10_000, 1_000, 1_000, 1_000), strict=True):
        parser.add_argument(f"--{kind}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    dataset = make_dataset(options.folder)
    checkpoint = make_checkpoint(options.folder, dataset)
    print(f"| of | damage | number | found by | {SILENT.lower()} | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    num_silent = 0
    for what, folder, damage in (
        ("checkpoint", checkpoint, damage_checkpoint),
        ("dataset", dataset, damage_dataset),
    ):
        for kind in KINDS:
            began, count = time.monotonic(), getattr(options, kind)
            found: Counter[str] = damage(folder, kind, count, random.Random(options.seed))
            silent = found.pop(SILENT, 0)
            num_silent += silent
            said = ", ".join(f"{who} {number:,}" for who, number in found.most_common())
            seconds = time.monotonic() - began
            print(
                f"| {what} | {kind} | {count:,} | {said} | {silent} | {seconds:.0f} |", flush=True
            )
    sys.exit(bool(num_silent))


def make_dataset(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = write_corpus(folder / "text.jsonl", 600)
    more = write_corpus(folder / "more.jsonl", 400, start=5000)
    config = PrepareConfig(
        output=str(folder / "dataset"), sources={"text": (str(text),), "more": (str(more),)},
        vocab_size=360, heldout_fraction=0.05, block_tokens=4096, num_processes=1,
    )  # fmt: skip
    return told("a dataset", prepare(config))


def make_checkpoint(folder: Path, dataset: Path) -> Path:
    result = launch(tiny_preset(folder, dataset, steps=3), processes=2)
    if result.returncode:
        sys.exit(result.stdout + result.stderr)
    return told("a checkpoint", list_checkpoints(folder / "run")[-1])


def told(what: str, folder: Path) -> Path:
    paths = files_of(folder)
    size = sum(path.stat().st_size for path in paths)
    print(f"{what} of {len(paths)} files, {size / 1e6:.1f} MB")
    return folder


if __name__ == "__main__":
    main()
