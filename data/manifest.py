"""A dataset's manifest.json in, what it promises out, and what of a folder does not keep it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import xxhash

from data.files import file_digest, folder_digest, parse_json, read_small

FORMAT = "cloze-shards-v1"
SEAL = "entries_xxh3"  # xxh3_128 of the other entries as JSON, in their order
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")
TOTALS = ("num_documents", "num_tokens", "num_sentences")
SOURCE_NAME = re.compile(
    r"[a-z0-9_]{1,40}"
)  # part of names in tars, which have room for 100 characters
MAX_COUNT = 1 << 60  # of anything: more are in no dataset
MAX_TOLD = 10  # problems in one message
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


def read_manifest(path: Path) -> tuple[bytes, dict[str, Any]]:
    """A local manifest.json: its bytes, and what they say. ValueError as of `parse_manifest`."""
    raw = read_small(path)
    return raw, parse_manifest(str(path), raw)


def parse_manifest(place: str, raw: bytes) -> dict[str, Any]:
    """What a manifest says. ValueError, naming `place`, for what is no manifest of this format.

    Whoever wrote it decides where we read, and how much: every name and number in it is looked at here. Those
    without a seal are of earlier versions.
    """
    manifest = parse_json(place, raw)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{place} has format {found!r}; this version reads {FORMAT!r}")
    if SEAL in manifest and (wanted := sealed(manifest)[SEAL]) != manifest[SEAL]:
        raise ValueError(
            f"{place} is damaged, or was edited: the digest of its entries is {wanted}, it says "
            f"{manifest[SEAL]}. Restore it from a copy, or prepare the dataset again"
        )
    if problems := _manifest_problems(manifest):
        more = f"; and {len(problems) - MAX_TOLD} more" if len(problems) > MAX_TOLD else ""
        raise ValueError(f"{place} is damaged: " + "; ".join(problems[:MAX_TOLD]) + more)
    return manifest


def _manifest_problems(manifest: dict[str, Any]) -> list[str]:
    problems = _wrong_values(manifest, "", {"vocab_size": _COUNT, "token_dtype": _DTYPE})
    problems += _wrong_values(manifest, "", {n: k for n, k in OPTIONAL.items() if n in manifest})
    problems += _wrong_values(
        manifest.get("blocks"), "blocks.", {"nbytes": _COUNT, "num_blocks": _COUNT, "xxh3": _DIGEST}
    )
    tokenizer = manifest.get("tokenizer")
    problems += _wrong_values(tokenizer, "tokenizer.", {"digest": _DIGEST, "special_ids": _IDS})
    if isinstance(tokenizer, dict):
        names = tokenizer.get("files", [])
        problems += [
            f"tokenizer.files names {name!r}, which is no file of a tokenizer"
            for name in (names if isinstance(names, list) else [names])
            if name not in TOKENIZER_FILES
        ]
    sources = manifest.get("sources")
    if not isinstance(sources, dict) or not sources:
        return [*problems, "sources is no mapping of names to what they hold"]
    for name, splits in sources.items():
        if not SOURCE_NAME.fullmatch(name):
            problems.append(f"sources has {name!r}: a name is 1 to 40 of a-z, 0-9 and _")
            continue
        for split in SPLITS:
            held = splits.get(split) if isinstance(splits, dict) else None
            problems += _split_problems(held, name, split)
    return problems


def _split_problems(held: Any, source: str, split: Split) -> list[str]:
    """What is wrong with one split of one source."""
    prefix = f"sources.{source}.{split}."
    problems = _wrong_values(held, prefix, dict.fromkeys(TOTALS, _COUNT) | {"shards": _LIST})
    if problems:
        return problems
    for number, entry in enumerate(held["shards"]):
        wrong = _wrong_values(
            entry, f"{prefix}shards.{number}.", {"nbytes": _COUNT, "xxh3": _DIGEST}
        )
        path = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(path, str) or not re.fullmatch(
            rf"{source}/{split}/{source}-{split}-\d{{6,9}}\.tar", path
        ):
            wrong.append(f"{prefix}shards.{number}.path is {path!r}, which is no name of a shard")
        problems += wrong
    if not problems and len({entry["path"] for entry in held["shards"]}) < len(held["shards"]):
        problems.append(f"{prefix}shards names a shard twice")
    return problems


class _Kind(NamedTuple):
    said: str
    fits: Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_COUNT


_COUNT = _Kind("a number from 0 on", _is_count)
_DTYPE = _Kind("u16 or u32", lambda value: value in ("u16", "u32"))
_LIST = _Kind("a list", lambda value: isinstance(value, list))
_DIGEST = _Kind(
    "a hash of 32 hex digits",
    lambda value: isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32}", value) is not None,
)
_IDS = _Kind(
    "a mapping of tokens to ids",
    lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
)

_NUMBER = _Kind(
    "a number from 0 on", lambda value: type(value) in (int, float) and 0 <= value < MAX_COUNT
)
OPTIONAL = {  # datasets of earlier versions have none of these
    **dict.fromkeys(
        ("bigram_entropy_nats", "bigram_sample_pairs", "unigram_accuracy", "context_free_accuracy"),
        _NUMBER,
    ),
    "source_unigram_entropy_nats": _Kind(
        "a mapping of sources to nats",
        lambda value: isinstance(value, dict) and all(map(_NUMBER.fits, value.values())),
    ),
}


def _wrong_values(holder: Any, prefix: str, wanted: dict[str, _Kind]) -> list[str]:
    if not isinstance(holder, dict):
        return [f"{prefix.rstrip('.')} is no mapping"]
    return [
        f"{prefix}{name} is {str(holder.get(name))[:100]!r}, not {kind.said}"
        for name, kind in wanted.items()
        if not kind.fits(holder.get(name))
    ]


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
