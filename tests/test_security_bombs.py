"""Small files that would fill the memory, or be read for ever: refused for 64 MB at most (G20)."""

import gzip
import json
import lzma
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hostile import Outcome, edit_manifest, measure, member, replace_table, tar_of
from shard_support import make_dataset
from support import tiny_preset

MOST = 64 << 20  # bytes that the peak may rise by
READERS = """
from pathlib import Path
from data.corpus.readers import read_file
from data.corpus.recipe import SourceConfig
from data.shards import Dataset
from model.config import ModelConfig
from model.hf import import_hf
from model.weights import parameter_shapes
from trainer.checkpoint_files import problems_of
from trainer.config import load_config
from trainer.deepspeed_files import load_safely

parameter_shapes(ModelConfig(num_hidden_layers=1), 40)  # what torch imports when it is first asked

def read_dataset(path):
    Dataset.open(path).read_block(0)

def read_archive(path):
    return sorted({str(raw.reason) for raw in read_file(path, SourceConfig(files=()))})

def read_preset(path):
    load_config(Path(path), [])

def read_model(path):
    import_hf(Path(path))

def read_checkpoint(path):
    return problems_of(Path(path))

def read_deepspeed(path):
    load_safely(Path(path))
"""


def dataset(folder: Path) -> Path:
    make_dataset(folder / "dataset")
    return folder / "dataset"


def sparse_manifest(folder: Path) -> Path:
    root = dataset(folder)
    with (root / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)
    return root


def deep_manifest(folder: Path) -> Path:
    root = dataset(folder)
    (root / "manifest.json").write_text("[" * 1_000_000)
    return root


def table_of_many_rows(folder: Path) -> Path:
    """Its header says that there are 2^56 of them."""
    root = dataset(folder)
    path = root / "blocks.npy"
    raw = path.read_bytes()
    shape = raw.index(b"(", raw.index(b"'shape'"))
    end = raw.index(b"}", shape)
    path.write_bytes(raw[:shape] + f"({1 << 56},), ".encode().ljust(end - shape) + raw[end:])
    edit_manifest(root, lambda manifest: manifest["blocks"].update(num_blocks=1 << 56))
    return root


def block_of_gigabytes(folder: Path) -> Path:
    """The shard is a sparse file."""
    root = dataset(folder)
    with (root / "src/train/src-train-000000.tar").open("r+b") as file:
        file.truncate(8 << 30)
    replace_table(root, lambda table: table["nbytes"].__setitem__(0, (1 << 32) - 512))
    edit_manifest(root, lambda m: m["sources"]["src"]["train"]["shards"][0].update(nbytes=8 << 30))
    return root


def many_members(folder: Path) -> Path:
    header = member("a.bin").tobuf(tarfile.USTAR_FORMAT)
    (folder / "s.tar.zst").write_bytes(zstandard.compress(header * 60_000 + bytes(1024)))
    return folder / "s.tar.zst"


def long_name(folder: Path, kind: bytes, size: int) -> Path:
    info = member("././@LongLink", kind)
    info.size = size
    header = info.tobuf(tarfile.GNU_FORMAT)
    with gzip.open(folder / "s.tar.gz", "wb", compresslevel=1) as file:
        file.write(header)
        for _ in range(128):
            file.write(bytes(1 << 20))
    return folder / "s.tar.gz"


def large_member(folder: Path) -> Path:
    info = member("a.txt")
    info.size = 1 << 60
    (folder / "s.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    return folder / "s.tar"


def packed_member(folder: Path) -> Path:
    info = member("a.txt")
    info.size = 256 << 20
    packer = zstandard.ZstdCompressor().compressobj()
    with (folder / "s.tar.zst").open("wb") as file:
        file.write(packer.compress(info.tobuf(tarfile.GNU_FORMAT)))
        for _ in range(256):
            file.write(packer.compress(bytes(1 << 20)))
        file.write(packer.compress(bytes(1024)) + packer.flush())
    return folder / "s.tar.zst"


def packed_binary(folder: Path, suffix: str) -> Path:
    """A member that nobody wants, in 128 MB of zeros."""
    info = member("a.bin")
    info.size = 128 << 20
    content = tar_of([(member("b.txt"), b"A document.")])
    path = folder / f"s.tar{suffix}"
    opener = {".gz": gzip.open, ".xz": lzma.open}[suffix]
    with opener(path, "wb", **({"compresslevel": 1} if suffix == ".gz" else {"preset": 0})) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(128):
            file.write(bytes(1 << 20))
        file.write(content)
    return path


def alias_bomb(folder: Path) -> Path:
    path = tiny_preset(folder, folder)
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path.write_text(path.read_text() + "\n".join(lines))
    return path


def large_preset(folder: Path) -> Path:
    path = tiny_preset(folder, folder)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    return path


def large_model(folder: Path) -> Path:
    """A network of 10^15 weights in 200 bytes."""
    shape = {"model_type": "bert", "vocab_size": 1 << 24, "hidden_size": 1 << 20, "num_hidden_layers": 400,
             "num_attention_heads": 1 << 10, "intermediate_size": 1 << 20}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return folder


def large_header(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 40}))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    return folder


def large_tensor(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 40}))
    header = {"a": {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 1 << 52]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return folder


def large_json(folder: Path, name: str) -> Path:
    with (folder / name).open("wb") as file:
        file.truncate(1 << 40)
    return folder


def packed_pickle(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as file:
            for _ in range(128):
                file.write(bytes(1 << 20))
        archive.writestr("archive/version", "3")
    return folder / "x.pt"


BOMBS: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "a manifest of 1 TB": ("dataset", sparse_manifest, "manifest.json has"),
    "a manifest nested deeply": ("dataset", deep_manifest, "nested too deeply"),
    "a table of 2^56 rows": ("dataset", table_of_many_rows, "blocks.npy is no block table"),
    "a block of 4 GB": ("dataset", block_of_gigabytes, "the bytes of a block"),
    "60,000 members": ("archive", many_members, "[]"),
    "a name of 128 MB": ("archive", lambda f: long_name(f, b"L", 1 << 27), "damaged_file"),
    "a PAX header of 128 MB": ("archive", lambda f: long_name(f, b"x", 1 << 27), "damaged_file"),
    "a global header of 128 MB": ("archive", lambda f: long_name(f, b"g", 1 << 27), "damaged_file"),
    "a member of 2^60 bytes": ("archive", large_member, "damaged_file"),
    "a packed member of 256 MB": ("archive", packed_member, "too_long"),
    "128 MB of zeros in a .gz": ("archive", lambda f: packed_binary(f, ".gz"), "['None']"),
    "128 MB of zeros in a .xz": ("archive", lambda f: packed_binary(f, ".xz"), "['None']"),
    "aliases for 10^12 texts": ("preset", alias_bomb, "is not valid YAML"),
    "a preset of 1 TB": ("preset", large_preset, "bytes, over 1,048,576"),
    "a model of 10^15 weights": ("model", large_model, "is missing"),
    "a header of 2^60 bytes": ("model", large_header, "model.safetensors is damaged"),
    "a tensor of 2^52 bytes": ("model", large_tensor, "model.safetensors is damaged"),
    "a config.json of 1 TB": ("model", lambda f: large_json(f, "config.json"), "config.json has"),
    "a MANIFEST.json of 1 TB": (
        "checkpoint", lambda f: large_json(f, "MANIFEST.json"), "MANIFEST.json has",
    ),
    "a pickle of 128 MB in a .pt": ("deepspeed", packed_pickle, "unpack to"),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("bombs")
    (folder / "readers.py").write_text(READERS)
    made = {}
    for number, (name, (reader, make, _)) in enumerate(BOMBS.items()):
        (folder / str(number)).mkdir()
        made[name] = reader, make(folder / str(number))
    found = measure(folder / "readers.py", made)
    shutil.rmtree(folder)
    return found


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_fills_no_memory(
    bomb: str, outcomes: dict[str, Outcome], record_property: Callable[[str, object], None]
) -> None:
    risen, seconds, said = outcomes[bomb]
    record_property("megabytes, seconds", (risen / 1e6, seconds))
    print(f"{bomb}: {risen / 1e6:.1f} MB, {seconds:.2f} s")
    assert BOMBS[bomb][2] in said
    assert risen <= MOST
