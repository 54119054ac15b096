"""What a user sees of `cloze prepare`: progress bars, the summary, and what to do when the disk is full."""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.files import NO_SPACE, read_json
from data.plan import WORK_FOLDER
from data.scan import Scan
from data.shards import SPLITS, Dataset

OUTPUT_PER_TEXT_BYTE = 1.5  # spill and shards: twice 2.3 bytes a token, at 3 bytes of text a token


@contextmanager
def stage(seconds: dict[str, float], name: str, total: int, unit: str) -> Iterator[tqdm]:
    """A progress bar on stderr. The stage's time is added to `seconds`."""
    start = time.monotonic()
    seldom = 0.5 if sys.stderr.isatty() else 30.0  # seconds between two lines of a log file
    with tqdm(
        total=total,
        desc=f"{name:<9}",
        unit=unit or " tasks",
        unit_scale=bool(unit),
        mininterval=seldom,
        dynamic_ncols=True,
    ) as bar:
        yield bar
    seconds[name] = time.monotonic() - start


@contextmanager
def explain_full_disk(root: Path) -> Iterator[None]:
    """Turn "no space left" into a ValueError with path, room and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        free = shutil.disk_usage(root).free
        raise ValueError(
            f"no room to write {error.filename or root} ({error.strerror}): {free:,} bytes are free there, "
            f"about {_bytes_needed(root):,} more are needed (half of all only until the end). Make room and "
            "run the same command again: what is finished is kept"
        ) from error


def _bytes_needed(root: Path) -> int:
    """What the files scanned so far will still take, roughly and rather too much."""
    scans = (read_json(path) for path in (root / WORK_FOLDER / "scan").glob("*.json"))
    text = sum(sum(scan["num_bytes"].values()) for scan in scans)
    written = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    return max(0, int(text * OUTPUT_PER_TEXT_BYTE) - written)


def print_summary(
    root: Path, scans: list[Scan], encoded: list[dict[str, int]], seconds: dict[str, float]
) -> None:
    """What was made, and what it took in this run."""
    dataset = Dataset.open(root)
    manifest: dict[str, Any] = dataset.manifest
    print(f"{root}: vocabulary {dataset.vocab_size:,}, digest {dataset.digest}")
    print(
        f"{'source':<16} {'split':<8} {'documents':>11} {'tokens':>15} {'blocks':>8} {'shards':>7}"
    )
    for source in dataset.sources:
        for split in SPLITS:
            held = manifest["sources"][source][split]
            blocks = len(dataset.block_indices(split, source))
            print(
                f"{source:<16} {split:<8} {held['num_documents']:>11,} {held['num_tokens']:>15,} "
                f"{blocks:>8,} {len(held['shards']):>7,}"
            )
    bigram = manifest.get("bigram_entropy_nats")
    num_bytes = sum(sum(scan.num_bytes.values()) for scan in scans)
    num_tokens = sum(counts["num_tokens"] for counts in encoded)
    print(
        f"{num_bytes:,} bytes of text, {num_bytes / num_tokens:.2f} bytes per token; unigram entropy "
        f"{manifest['unigram_entropy_nats']:.4f} nats, of held-out text "
        f"{manifest['heldout_unigram_nats']:.4f}"
        + (f"; bigram entropy {bigram:.4f}" if bigram is not None else "")
    )
    if num_empty := sum(scan.num_empty for scan in scans):
        print(f"skipped {num_empty:,} empty documents")
    if num_bare := sum(counts["num_without_tokens"] for counts in encoded):
        print(f"skipped {num_bare:,} documents of control characters only")
    print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
