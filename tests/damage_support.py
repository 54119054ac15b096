"""Files in, one random damage to them out, undone afterwards; and what readers of them say."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.shards import DamagedBlock, Dataset, UnreachableBlock
from trainer import checkpoint_files

KINDS = ("flips", "cuts", "zeroed", "swaps")  # of a bit; at any length; a page of a file; two files
PAGE = 4096
SILENT = "SILENT"


@contextmanager
def damaged(paths: list[Path], kind: str, rng: random.Random) -> Iterator[dict[Path, bytes]]:
    """Damage one of the files, or exchange two. Yields what those held that have changed."""
    before: dict[Path, bytes] = {}
    after: dict[Path, bytes] = {}
    while before == after:  # a page of zeros, or two equal files: no damage
        before = {p: p.read_bytes() for p in rng.sample(paths, 2 if kind == "swaps" else 1)}
        contents = [altered(content, kind, rng) for content in before.values()]
        after = dict(zip(before, reversed(contents), strict=True))
    try:
        for path, content in after.items():
            path.write_bytes(content)
        yield before
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def altered(content: bytes, kind: str, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    if kind == "flips":
        return (
            content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        )
    if kind == "cuts":
        return content[:place]
    if kind == "zeroed":
        page = content[place - place % PAGE :][:PAGE]
        return (
            content[: place - place % PAGE]
            + bytes(len(page))
            + content[place - place % PAGE + PAGE :]
        )
    return content


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def damage_checkpoint(folder: Path, kind: str, count: int, rng: random.Random) -> Counter[str]:
    """Damage a checkpoint `count` times; how often the check before a resume has found it."""
    found: Counter[str] = Counter()
    paths = files_of(folder)
    for _ in range(count):
        with damaged(paths, kind, rng) as changed:
            is_found = bool(checkpoint_files.problems_of(folder))
            found["refused" if is_found else SILENT] += 1
            if not is_found:
                print(f"{kind}: unseen in {', '.join(map(str, changed))}")
    return found


def damage_dataset(root: Path, kind: str, count: int, rng: random.Random) -> Counter[str]:
    """Damage shards, tables and tokenizer of a dataset; who has found it, the first of those who look.

    A dataset that was opened before the damage, as training's, must refuse every block that has changed.
    Of bytes of a shard that are in no block training knows nothing: `verify` has to find those.
    """
    found: Counter[str] = Counter()
    tables = [root / "manifest.json", root / "blocks.npy", *files_of(root / "tokenizer")]
    shards = sorted(path for path in root.glob("*/*/*.tar"))
    opened = Dataset.open(root)
    blocks_of: dict[Path, list[int]] = {path: [] for path in shards}
    for index in range(len(opened.blocks)):
        blocks_of[opened.shard_of(index)].append(index)
    for _ in range(count):
        paths = tables if rng.random() < 0.1 else shards
        with damaged(paths, kind, rng) as changed:
            hurt = [
                index
                for path, before in changed.items()
                for index in blocks_of.get(path, [])
                if bytes_of(opened, index, before) != bytes_of(opened, index, path.read_bytes())
            ]
            if hurt:
                verdict = "refused when read" if all(refuses(opened, i) for i in hurt) else SILENT
            else:
                verdict = found_at_rest(root)
            found[verdict] += 1
            if verdict == SILENT:
                print(f"{kind}: unseen in {', '.join(map(str, changed))}, blocks {hurt}")
    return found


def bytes_of(dataset: Dataset, index: int, shard: bytes) -> bytes:
    row = dataset.blocks[index]
    return shard[int(row["offset"]) :][: int(row["nbytes"])]


def refuses(dataset: Dataset, index: int) -> bool:
    try:
        dataset.read_block(index)
    except (DamagedBlock, UnreachableBlock):
        return True
    return False


def found_at_rest(root: Path) -> str:
    """Who notices a damage that no block has."""
    try:
        dataset = Dataset.open(root)
    except ValueError:
        return "refused at opening"
    try:
        dataset.verify()
    except ValueError:
        return "in no block, found by verify"
    return SILENT
