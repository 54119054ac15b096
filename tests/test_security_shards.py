"""Datasets that an attacker has made, every hash in them right: refused by name, and nothing of them runs."""

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile import (
    BOMBS,
    edit_manifest,
    member,
    pickled,
    replace_first_block,
    replace_table,
    tar_of,
)
from remote_support import quick_options
from shard_support import make_dataset

from data.corpus.readers import read_file
from data.corpus.recipe import SourceConfig
from data.object_store import ObjectStoreTransport
from data.shards import DamagedBlock, Dataset
from data.transfer import parse_location


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original")
    make_dataset(root)
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "dataset"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def test_the_bombs_are_real(canary: Path) -> None:
    for kind in BOMBS:
        pickle.loads(pickled(kind, canary))
        canary.unlink()


def header(block: bytes, number: int) -> int:
    """Where the number-th member's header begins."""
    position = 0
    for _ in range(number):
        size = int(block[position + 124 : position + 135], 8)
        position += 512 + size + -size % 512
    return position


def put(block: bytes, number: int, offset: int, content: bytes) -> bytes:
    """The block with other bytes in the number-th member's header."""
    at = header(block, number) + offset
    return block[:at] + content + block[at + len(content) :]


def with_pickle(block: bytes, kind: str, canary: Path) -> bytes:
    """The tokens are a pickle, under the name of one."""
    at, bomb = header(block, 4), pickled(kind, canary)
    block = put(block, 4, 0, b"src-train-000000-00000.pkl".ljust(100, b"\0"))
    return block[: at + 512] + bomb + block[at + 512 + len(bomb) :]


FORGED: dict[str, Callable[[bytes], bytes]] = {
    "parent folder": lambda b: put(b, 0, 0, b"../../../tmp/x".ljust(100, b"\0")),
    "absolute": lambda b: put(b, 0, 0, b"/etc/cron.d/x".ljust(100, b"\0")),
    "symbolic link": lambda b: put(b, 1, 156, b"2"),
    "hard link": lambda b: put(b, 1, 156, b"1"),
    "character device": lambda b: put(b, 2, 156, b"3"),
    "block device": lambda b: put(b, 2, 156, b"4"),
    "FIFO": lambda b: put(b, 3, 156, b"6"),
    "GNU sparse": lambda b: put(b, 3, 156, b"S"),
    "GNU long name": lambda b: put(b, 4, 156, b"L"),
    "PAX header": lambda b: put(b, 4, 156, b"x"),
    "2^60 bytes": lambda b: put(b, 5, 124, b"\x80" + (1 << 60).to_bytes(11, "big")),
    "8 GiB in octal": lambda b: put(b, 5, 124, b"77777777777\0"),
    "negative size": lambda b: put(b, 5, 124, b"\xff" * 12),
    "no size": lambda b: put(b, 5, 124, b"\0" * 12),
    "a name twice": lambda b: put(b, 1, 0, b[: b.index(b"\0")].ljust(100, b"\0")),
    "nothing but zeros": lambda b: bytes(len(b)),
    "compressed": lambda b: gzip.compress(b)[: len(b)].ljust(len(b), b"\0"),
    ".npy": lambda b: put(b, 4, 0, b"src-train-000000-00000.npy".ljust(100, b"\0")),
    ".pth": lambda b: put(b, 4, 0, b"src-train-000000-00000.pth".ljust(100, b"\0")),
    ".pyd": lambda b: put(b, 4, 0, b"src-train-000000-00000.pyd".ljust(100, b"\0")),
}


@pytest.mark.parametrize("attack", FORGED)
def test_a_block_of_anything_but_its_members_is_damaged(attack: str, root: Path) -> None:
    replace_first_block(root, FORGED[attack])
    dataset = Dataset.open(root)
    with pytest.raises(DamagedBlock, match=r"block 0 \(.*src-train-000000\.tar.*is inconsistent"):
        dataset.read_block(0)


@pytest.mark.parametrize("kind", BOMBS)
def test_a_pickle_in_a_block_is_never_looked_into(kind: str, root: Path, canary: Path) -> None:
    replace_first_block(root, lambda block: with_pickle(block, kind, canary))
    with pytest.raises(DamagedBlock, match=r"\.pkl.* stands where a file \.tok\.u16 should"):
        Dataset.open(root).read_block(0)
    assert not canary.exists()


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("form", ["npy", "pickle", "npz"])
def test_a_block_table_is_no_pickle(form: str, kind: str, root: Path, canary: Path) -> None:
    objects = np.array([BOMBS[kind](canary)], dtype=object)
    buffer = io.BytesIO()
    if form == "npy":
        np.save(buffer, objects, allow_pickle=True)
    elif form == "npz":
        np.savez(buffer, blocks=objects)
    (root / "blocks.npy").write_bytes(buffer.getvalue() or pickled(kind, canary))
    edit_manifest(root, lambda manifest: None)
    with pytest.raises(ValueError, match=r"blocks\.npy is no block table"):
        Dataset.open(root)
    assert not canary.exists()


TABLES: dict[str, tuple[Callable[[np.ndarray], object], str]] = {
    "an offset after the end": (lambda t: t["offset"].__setitem__(-1, 1 << 40), "ends after its"),
    "an offset that wraps": (lambda t: t["offset"].__setitem__(-1, 2**64 - 1), "ends after its"),
    "4 GB in a block": (lambda t: t["nbytes"].__setitem__(0, 2**32 - 1), "bytes of a block"),
    "4 G tokens": (lambda t: t["num_tokens"].__setitem__(0, 2**32 - 1), "blocks of .* tokens"),
    "no tokens": (lambda t: t["num_tokens"].__setitem__(0, 0), "blocks of 0 to"),
    "a source that is not there": (lambda t: t["source"].__setitem__(-1, 9), "does not name"),
    "a split that is not there": (lambda t: t["split"].__setitem__(-1, 7), "does not name"),
    "a shard that is not there": (lambda t: t["shard"].__setitem__(-1, 99), "does not name"),
    "another order": (lambda t: t.__setitem__(slice(None), t[::-1].copy()), "not in the order"),
}


@pytest.mark.parametrize("attack", TABLES)
def test_a_table_may_not_point_elsewhere(attack: str, root: Path) -> None:
    change, expected = TABLES[attack]
    replace_table(root, change)
    with pytest.raises(ValueError, match=expected) as caught:
        Dataset.open(root)
    assert str(root) in str(caught.value) and "blocks.npy, rows from 0 on" in str(caught.value)


def forged_manifest(manifest: dict, name: str) -> None:
    manifest["sources"]["src"]["train"]["shards"][0]["path"] = name


NAMES = (
    "../../../etc/passwd", "/etc/passwd", "src/train/../../../etc/shadow", "file:///etc/passwd",
    "pipe:touch {canary}", "pipe:cat /etc/passwd|", "| touch {canary}", "$(touch {canary})",
    "`touch {canary}`", "src/train/src-train-000000.tar; touch {canary}", "ais://bucket/x.tar",
    "hf://datasets/x", "gs://bucket/x.tar", "ssh://host/x", "local:///etc/passwd", "s3://bucket/x",
    "src/train/src-train-000000.tar\n", "src/train/src-train-\0.tar", "src/train/src-train-{{0..10**9}}.tar",
    "src/train/src-train-{{000000..999999999}}.tar", "~/x.tar", "src/train/src-train-000000.tar.gz", "",
    "src/train/src-train-000001.pkl", "src\\train\\src-train-000000.tar", "x" * 100_000,
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_shard_has_the_name_of_a_shard(name: str, root: Path, canary: Path) -> None:
    edit_manifest(root, lambda m: forged_manifest(m, name.format(canary=canary)))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: .*which is no name of a"):
        Dataset.open(root)
    assert not canary.exists()


def renamed_source(manifest: dict, name: str) -> None:
    """All that is said of it fits."""
    text = json.dumps(manifest["sources"].pop("src")).replace("src", name)
    manifest["sources"][name] = json.loads(text)


MANIFESTS: dict[str, Callable[[dict], object]] = {
    "sources has '..'": lambda m: renamed_source(m, ".."),
    "sources has '../../etc'": lambda m: renamed_source(m, "../../etc"),
    "sources has '/etc'": lambda m: renamed_source(m, "/etc"),
    "sources is": lambda m: m.__setitem__("sources", []),
    "sources.src.train is no mapping": lambda m: m["sources"]["src"].pop("train"),
    "shards names a shard twice": lambda m: m["sources"]["src"]["train"].__setitem__(
        "shards", m["sources"]["src"]["train"]["shards"][:1] * 2
    ),
    "sources.src.train.shards is 'x'": lambda m: m["sources"]["src"]["train"].update(shards="x"),
    "blocks is no mapping": lambda m: m.pop("blocks"),
    "blocks.num_blocks is '-1'": lambda m: m["blocks"].update(num_blocks=-1),
    "blocks.nbytes is '1e+300'": lambda m: m["blocks"].update(nbytes=1e300),
    "tokenizer is no mapping": lambda m: m.update(tokenizer=None),
    "tokenizer.special_ids is": lambda m: m["tokenizer"].update(special_ids={"[PAD]": "x"}),
    "vocab_size is": lambda m: m.update(vocab_size=1 << 70),
    "token_dtype is 'O'": lambda m: m.update(token_dtype="O"),
    "tokenizer.files names '../../x'": lambda m: m["tokenizer"].update(files=["../../x"]),
    "tokenizer.files names 'evil.py'": lambda m: m["tokenizer"].update(files=["evil.py"]),
}


@pytest.mark.parametrize("expected", MANIFESTS)
def test_a_manifest_says_what_manifests_say(expected: str, root: Path) -> None:
    edit_manifest(root, MANIFESTS[expected])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged") as caught:
        Dataset.open(root)
    for part in expected.split():
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{}", "[1]", "\0", '{"format": 1}', "nan"])
def test_what_is_no_manifest_is_refused(text: str, root: Path) -> None:
    (root / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json (is|has)"):
        Dataset.open(root)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "pipe://touch", "local:///etc", "ssh://host/x", "sftp://host/x", "ftp://host/x",
        "zip://x", "github://o:r@x/y", "git://x", "hf://datasets/x", "reference://x", "data://x", "ais://x",
        "jupyter://x", "dask://x", "shell://touch",
    ],
)  # fmt: skip
def test_only_web_and_object_stores_are_read(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not read; http|is on this machine|carries a user"):
        Dataset.open(url, quick_options(tmp_path))


def test_the_stores_that_may_be_read_can_be(tmp_path: Path) -> None:
    assert (
        ObjectStoreTransport(parse_location("memory://bucket/set"), 1.0).location.scheme == "memory"
    )


HOSTILE_MEMBERS: dict[str, tuple[tarfile.TarInfo, bytes]] = {
    "parent folder": (member("../../escaped.txt"), b"text of a document"),
    "absolute": (member("/escaped.txt"), b"text of a document"),
    "symbolic link": (member("a.txt", tarfile.SYMTYPE, "/etc/passwd"), b""),
    "hard link": (member("a.txt", tarfile.LNKTYPE, "/etc/passwd"), b""),
    "character device": (member("a.txt", tarfile.CHRTYPE), b""),
    "FIFO": (member("a.txt", tarfile.FIFOTYPE), b""),
    "shared library": (member("a.pyd"), b"MZ"),
    "path file": (member("a.pth"), b"import os"),
    "sparse": (member("a.txt", tarfile.GNUTYPE_SPARSE), b""),
}


@pytest.mark.parametrize("attack", HOSTILE_MEMBERS)
def test_an_archive_of_documents_is_never_extracted(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "below" / "here"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    good = (member("good.txt"), b"A document that is one.")
    (place / "s.tar").write_bytes(tar_of([HOSTILE_MEMBERS[attack], good]))
    texts = [raw.text for raw in read_file("s.tar", SourceConfig(files=()))]
    assert texts[-1] == "A document that is one."
    assert not any(text and "root:" in text for text in texts)
    assert sorted(os.listdir(tmp_path)) == ["below"] and os.listdir(place) == ["s.tar"]
    assert not Path("/escaped.txt").exists()


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pt", "npy", "json"])
def test_no_member_of_an_archive_is_unpickled(
    suffix: str, kind: str, tmp_path: Path, canary: Path
) -> None:
    members = [(member(f"a.{suffix}"), pickled(kind, canary)), (member("b.txt"), b"Good text.")]
    (tmp_path / "s.tar").write_bytes(tar_of(members))
    found = list(read_file(str(tmp_path / "s.tar"), SourceConfig(files=())))
    assert found[-1].text == "Good text." and all(raw.text in (None, "Good text.") for raw in found)
    assert not canary.exists()


def test_a_member_that_claims_more_than_there_is(tmp_path: Path) -> None:
    info = member("a.txt")
    info.size = 1 << 60
    (tmp_path / "s.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024)
    (raw, damage) = read_file(str(tmp_path / "s.tar"), SourceConfig(files=()))
    assert (raw.reason, damage.reason) == ("too_long", "damaged_file")
    assert "s.tar: the archive ends within a member" in damage.detail


def test_a_member_of_less_than_nothing(tmp_path: Path) -> None:
    """tarfile would go back, and read it for ever."""
    header = bytearray(member("a.bin").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xf6\x00"  # -2,560
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "s.tar").write_bytes(bytes(header) + bytes(4096))
    (damage,) = read_file(str(tmp_path / "s.tar"), SourceConfig(files=()))
    assert damage.reason == "damaged_file"


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_name_that_never_ends(kind: bytes, tmp_path: Path) -> None:
    info = member("././@LongLink", kind)
    info.size = 1 << 40
    (tmp_path / "s.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 4096)
    (damage,) = read_file(str(tmp_path / "s.tar"), SourceConfig(files=()))
    assert (
        damage.reason == "damaged_file" and "a header of 1,099,511,627,776 bytes" in damage.detail
    )


def test_a_manifest_with_a_forged_tokenizer_writes_nothing(root: Path, tmp_path: Path) -> None:
    """Of a remote dataset, where the names would be those of files to write."""
    from fault_server import FaultServer

    edit_manifest(root, lambda m: m["tokenizer"].update(files=["../../../escaped"]))
    assert json.loads((root / "manifest.json").read_text())["tokenizer"]["files"]
    with FaultServer.serving(root) as server:
        with pytest.raises(ValueError, match="no file of a tokenizer"):
            Dataset.open(server.url, quick_options(tmp_path))
        assert {request.path for request in server.requests} == {"manifest.json"}
