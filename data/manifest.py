"""A dataset's manifest.json in, what it promises out, and what of a folder does not keep it."""

import json
from pathlib import Path
from typing import Any, Literal

import xxhash

from data.files import file_digest, folder_digest

FORMAT = "cloze-shards-v1"
SEAL = "entries_xxh3"  # xxh3_128 of the other entries as JSON, in their order
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")
TOKENIZER_FILES = (  # all that may be in tokenizer/
    "sentencepiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a digest of all its other entries: nothing else vouches for a special token's id."""
    rest = {name: value for name, value in manifest.items() if name != SEAL}
    written = json.dumps(rest, ensure_ascii=False, separators=(",", ":"))
    return {**rest, SEAL: xxhash.xxh3_128_hexdigest(written.encode("utf-8"))}


def parse_manifest(place: str, raw: bytes) -> dict[str, Any]:
    """ValueError, naming `place`, for what is no manifest of this format, or not as it was written.

    Manifests without a seal are those of earlier versions.
    """
    try:
        manifest = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{place} has format {found!r}; this version reads {FORMAT!r}")
    if SEAL in manifest and (wanted := sealed(manifest)[SEAL]) != manifest[SEAL]:
        raise ValueError(
            f"{place} is damaged, or was edited: the digest of its entries is {wanted}, it says "
            f"{manifest[SEAL]}. Restore it from a copy, or prepare the dataset again"
        )
    return manifest


def shard_entries(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """{"path", "nbytes", "xxh3"} of every shard."""
    return [
        entry
        for splits in manifest["sources"].values()
        for split in SPLITS
        for entry in splits[split]["shards"]
    ]


def table_problems(root: Path, manifest: dict[str, Any]) -> list[str]:
    """What is wrong with blocks.npy and with the tokenizer's files."""
    problems = []
    table, expected = root / "blocks.npy", manifest["blocks"]
    if not table.is_file():
        problems.append("blocks.npy is missing")
    elif table.stat().st_size != expected["nbytes"]:
        size = table.stat().st_size
        problems.append(f"blocks.npy has {size} bytes, manifest says {expected['nbytes']}")
    elif (found := file_digest(table)) != expected["xxh3"]:
        problems.append(f"blocks.npy: xxh3 is {found}, manifest says {expected['xxh3']}")
    folder, wanted = root / "tokenizer", manifest["tokenizer"]["digest"]
    if not folder.is_dir():
        problems.append("tokenizer/ is missing")
    elif (found := folder_digest(folder)) != wanted:
        problems.append(f"tokenizer/: the digest of its files is {found}, manifest says {wanted}")
    return problems


def shard_problems(root: Path, manifest: dict[str, Any]) -> list[str]:
    """Shards that are missing, or have another size than was written."""
    problems = []
    for entry in shard_entries(manifest):
        try:
            size = (root / entry["path"]).stat().st_size
        except FileNotFoundError:
            problems.append(f"{entry['path']} is missing")
            continue
        if size != entry["nbytes"]:
            problems.append(f"{entry['path']} has {size} bytes, manifest says {entry['nbytes']}")
    return problems
