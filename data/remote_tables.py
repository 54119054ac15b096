"""A remote dataset in, a local folder with its small files out: manifest.json, blocks.npy, tokenizer/.

The folder is named by the dataset's URL and the digest of its manifest, and is complete or absent;
all processes of a machine share it. A dataset that was prepared anew gets a new folder. No shard is
asked for: opening a dataset takes as many requests for ten thousand shards as for one.
"""

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import xxhash

from data.cache import locked
from data.files import MAX_JSON_BYTES, TEMPORARY_MARK, publishing, sync_folder
from data.manifest import TOKENIZER_FILES, table_problems
from data.remote import PIECE_BYTES, Damage, RemoteShards
from data.storage import Absent

MAX_TOKENIZER_BYTES = 1 << 28  # of one file


def read_manifest(shards: RemoteShards) -> bytes:
    """The bytes of manifest.json as they are on the server now. ValueError or OSError."""
    try:
        return shards.read_whole("manifest.json", MAX_JSON_BYTES)
    except Absent as error:
        raise ValueError(
            f"{shards.place('')} has no manifest.json that may be read ({error.reason}): no complete "
            "dataset is there. Give the URL of the folder that `cloze prepare` wrote, wholly copied, "
            "and check that it may be read from here"
        ) from None
    except Damage as damage:
        raise ValueError(f"{shards.place('manifest.json')}: {damage.reason}") from None


def fetch_tables(shards: RemoteShards, raw: bytes, manifest: dict[str, Any]) -> Path:
    """The local folder of the dataset, fetched unless it is there and whole.

    raw: the manifest's bytes. ValueError when what comes is not what the manifest promises, as often
    as it is fetched; OSError when it cannot be had.
    """
    url = shards.location.base.encode()
    name = f"{xxhash.xxh3_128_hexdigest(url)}-{xxhash.xxh3_128_hexdigest(raw)}"
    folder = shards.options.cache_root / "datasets" / name
    if is_whole(folder, raw, manifest):
        return folder
    with locked(folder.with_name(f"{name}.lock"), wait=True):
        if is_whole(folder, raw, manifest):  # another process has fetched it
            return folder
        mine = folder.with_name(f"{name}{TEMPORARY_MARK}{socket.gethostname()}-{os.getpid()}")
        problems: list[str] = []
        try:
            for _ in range(1 + shards.options.num_refetches):
                shutil.rmtree(mine, ignore_errors=True)
                problems = fetch_into(mine, shards, raw, manifest)
                if not problems:
                    put_in_place(mine, folder)
                    return folder
        finally:
            shutil.rmtree(mine, ignore_errors=True)
    raise ValueError(f"{shards.place('')} is damaged:\n  " + "\n  ".join(problems))


def is_whole(folder: Path, raw: bytes, manifest: dict[str, Any]) -> bool:
    path = folder / "manifest.json"
    return path.is_file() and path.read_bytes() == raw and not table_problems(folder, manifest)


def fetch_into(
    folder: Path, shards: RemoteShards, raw: bytes, manifest: dict[str, Any]
) -> list[str]:
    """Fetch everything; returns what is wrong with it."""
    (folder / "tokenizer").mkdir(parents=True)
    try:
        fetch_table(folder / "blocks.npy", shards, manifest["blocks"]["nbytes"])
        refused = fetch_tokenizer(folder / "tokenizer", shards, manifest)
    except Damage as damage:
        return [damage.reason]
    with publishing(folder / "manifest.json") as file:
        file.write(raw)
    problems = table_problems(folder, manifest)
    if problems and refused:
        problems.append("not to be had: " + ", ".join(refused))
    return problems


def fetch_table(path: Path, shards: RemoteShards, nbytes: int) -> None:
    with open(path, "wb") as file:  # in a folder that gets its name when all is there
        for start in range(0, nbytes, PIECE_BYTES):
            length = min(PIECE_BYTES, nbytes - start)
            try:
                file.write(shards.read_range("blocks.npy", start, length))
            except Damage as damage:
                raise Damage(f"blocks.npy: {damage.reason}", damage.attempts) from None
        file.flush()
        os.fsync(file.fileno())


def fetch_tokenizer(folder: Path, shards: RemoteShards, manifest: dict[str, Any]) -> list[str]:
    """Fetch the tokenizer's files; returns those that are not there, with the server's reason.

    A manifest that does not list them leaves the names that a tokenizer may have; whether those that
    are there are all is told by the digest.
    """
    listed = manifest["tokenizer"].get("files")
    refused = []
    for name in listed or TOKENIZER_FILES:
        try:
            data = shards.read_whole(f"tokenizer/{name}", MAX_TOKENIZER_BYTES)
        except Absent as error:
            refused.append(f"tokenizer/{name} ({error.reason})")
            continue
        with publishing(folder / name) as file:
            file.write(data)
    return refused


def put_in_place(mine: Path, folder: Path) -> None:
    """Rename `mine` to `folder`; what was damaged there goes."""
    stale = mine.with_name(mine.name + "-stale")
    if folder.exists():
        os.rename(folder, stale)
    os.rename(mine, folder)
    sync_folder(folder.parent)
    shutil.rmtree(stale, ignore_errors=True)
