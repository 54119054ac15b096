"""Faults of servers: the right blocks, or an error that tells what to do, after a bounded number of tries."""

import pickle
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from fault_server import Fault, FaultServer, http_date
from remote_support import RETRIES, SHARD, blocks_of, equal, quick_options, same_blocks
from shard_support import make_dataset

from data.shards import Block, DamagedBlock, Dataset, StorageOptions, Unreachable, UnreachableBlock


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("original")
    make_dataset(root)
    return root


@pytest.fixture(scope="module")
def expected(original) -> list[Block]:
    return blocks_of(original)


@pytest.fixture
def server(original, tmp_path):
    with FaultServer.serving(Path(shutil.copytree(original, tmp_path / "served"))) as server:
        yield server


@pytest.fixture
def options(tmp_path) -> StorageOptions:
    return quick_options(tmp_path)


PASSING = [
    Fault("status", 500),
    Fault("status", 503),
    Fault("status", 408),
    Fault("status", 429, retry_after="0"),
    Fault("status", 503, retry_after=http_date(-1)),
    Fault("reset"),
    Fault("short"),
    Fault("silent_close"),
    Fault("drip"),
    Fault("hang"),
    Fault("wrong_range"),
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda f: f"{f.kind}{f.status}{f.retry_after or ''}")
def test_what_passes_is_tried_again(server, options, expected, fault):
    if fault.kind in ("drip", "hang"):
        options = replace(options, timeout_seconds=0.5)
    dataset = Dataset.open(server.url, options)
    server.script[SHARD] = [fault, fault]
    assert same_blocks(dataset, expected)
    # a kept connection that ends before any answer is opened anew, and is no fault
    assert dataset.shards.counts.num_faults == (1 if fault.kind == "silent_close" else 2)
    server.always[SHARD] = fault
    server.requests.clear()
    shutil.rmtree(options.cache_root)
    with pytest.raises(UnreachableBlock, match=f"block 0: {server.url}/{SHARD}.*tries: ") as error:
        dataset.read_block(0)
    if fault.kind == "status":
        assert f"HTTP {fault.status}" in str(error.value)
    if fault.kind in ("drip", "hang"):  # not: the connection ended
        assert re.search(r"(after|within) 0\.5 s", str(error.value))
    for failure in (error.value, pickle.loads(pickle.dumps(error.value))):  # as a worker's comes
        assert (failure.index, failure.attempts) == (0, RETRIES + 1)
        assert str(failure) == str(error.value)
    assert RETRIES + 1 <= len(server.requests) <= RETRIES + 2


def test_a_server_that_asks_to_wait_is_waited_for_and_told(server, options, expected, capsys):
    dataset = Dataset.open(server.url, replace(options, max_backoff_seconds=5.0))
    server.script[SHARD] = [Fault("status", 429, retry_after="1")]
    assert equal(dataset.read_block(0), expected[0])
    first, second = server.asked(SHARD)
    assert second.at - first.at >= 1.0
    assert f"{server.url}/{SHARD}" in (told := capsys.readouterr().err)
    assert "HTTP 429 Too Many Requests; try 2 follows in 1 s" in told


@pytest.mark.parametrize("kind", ["flip", "longer"])
def test_wrong_bytes_are_fetched_anew_then_told(server, options, expected, kind):
    dataset = Dataset.open(server.url, options)
    server.script[SHARD] = [Fault(kind), Fault(kind)]
    assert same_blocks(dataset, expected)
    assert dataset.shards.counts.num_damaged == 2
    server.always[SHARD] = Fault(kind)
    server.requests.clear()
    shutil.rmtree(options.cache_root)
    with pytest.raises(DamagedBlock, match=rf"block 1 \({server.url}/{SHARD}.*damaged") as error:
        dataset.read_block(1)
    assert (error.value.index, error.value.attempts) == (1, options.num_refetches + 1)
    assert error.value.shard == f"{server.url}/{SHARD}"
    assert error.value.offset == dataset.blocks[1]["offset"]
    assert len(server.requests) == options.num_refetches + 1


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "user:password@"), (403, "signed URL"), (404, "Check the URL"), (418, "HTTP 418")],
)
def test_what_no_retry_mends_is_told_at_once(server, options, status, advice):
    dataset = Dataset.open(server.url, options)
    server.always[SHARD] = Fault("status", status)
    with pytest.raises(UnreachableBlock, match=f"{server.url}/{SHARD}.*HTTP {status}") as error:
        dataset.read_block(0)
    assert advice in str(error.value) and error.value.attempts == 1
    assert len(server.asked(SHARD)) == 1


def test_a_compressing_server_is_refused(server, options):
    dataset = Dataset.open(server.url, options)
    server.always[SHARD] = Fault("gzip")
    with pytest.raises(UnreachableBlock, match="compresses"):
        dataset.read_block(0)
    assert len(server.asked(SHARD)) == 1


def test_a_server_without_ranges_serves_small_shards_only(server, options, expected, monkeypatch):
    dataset = Dataset.open(server.url, options)
    server.always[SHARD] = Fault("no_range")
    assert same_blocks(dataset, expected)
    shutil.rmtree(options.cache_root)
    with open(server.root / SHARD, "ab") as file:
        file.write(bytes(9 << 20))
    server.requests.clear()
    with pytest.raises(UnreachableBlock, match="ignores range requests"):
        dataset.read_block(0)
    assert len(server.requests) == 1


def test_redirects_are_followed_and_keep_secrets(server, options, expected, tmp_path):
    with FaultServer.serving(server.root) as other:
        secret = server.url.replace("://", "://me:hunter2@")
        dataset = Dataset.open(secret, options)
        server.always[SHARD] = Fault("redirect", location=f"{other.url}/{SHARD}?sig=topsecret")
        assert same_blocks(dataset, expected)
        assert all(request.authorization for request in server.requests)
        assert other.requests and not any(request.authorization for request in other.requests)
        server.always[SHARD] = Fault("redirect", location=f"/{SHARD}")
        shutil.rmtree(options.cache_root)
        with pytest.raises(UnreachableBlock, match="redirects more than 5 times"):
            dataset.read_block(0)


SECRET_FAULTS = [*PASSING, Fault("flip"), Fault("status", 403), Fault("status", 404), Fault("gzip")]


def test_no_message_holds_a_secret(server, options):
    url = server.url.replace("://", "://me:hunter2@") + "?sig=topsecret"
    options = replace(options, num_retries=0, num_refetches=0, timeout_seconds=1)
    dataset = Dataset.open(url, options)
    told = [repr(vars(dataset.shards)), dataset.place]
    for fault in SECRET_FAULTS:
        server.always[SHARD] = fault
        with pytest.raises((UnreachableBlock, DamagedBlock)) as error:
            dataset.read_block(0)
        chained = [error.value, error.value.__cause__]
        if not error.value.__suppress_context__:
            chained.append(error.value.__context__)
        told += [f"{e} {e!r} {vars(e)}" for e in chained if e is not None]
    server.always["manifest.json"] = Fault("status", 403)
    with pytest.raises(ValueError, match="HTTP 403") as error:
        Dataset.open(url, options)
    told.append(str(error.value))
    for text in told:
        assert "hunter2" not in text and "topsecret" not in text and "SECRET" not in text


def test_a_server_that_is_not_there(tmp_path, options):
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/set"
        with pytest.raises(
            Unreachable, match=f"{url}/manifest.json.*refused.*tries: {RETRIES + 1}"
        ):
            Dataset.open(url, options)


def test_what_is_no_dataset(server, options):
    with pytest.raises(ValueError, match=f"{server.url}/nowhere/ has no manifest.json.*HTTP 404"):
        Dataset.open(f"{server.url}/nowhere", options)
    (server.root / "manifest.json").write_text("<html>hello</html>")
    with pytest.raises(ValueError, match=f"{server.url}/manifest.json is not JSON"):
        Dataset.open(server.url, options)


@pytest.mark.parametrize("name", ["blocks.npy", "tokenizer/tokenizer.json"])
def test_a_damaged_table_is_fetched_anew_then_told(server, options, name):
    server.script[name] = [Fault("flip")]
    Dataset.open(server.url, options)
    assert len(server.asked(name)) == 2
    shutil.rmtree(options.cache_root)
    server.always[name] = Fault("flip")
    with pytest.raises(ValueError, match=f"{server.url}/ is damaged:\n.*{name.split('/')[0]}"):
        Dataset.open(server.url, options)
    assert len(server.asked(name)) == 2 + options.num_refetches + 1
    server.always[name] = Fault("status", 404)
    with pytest.raises((ValueError, Unreachable), match=name):
        Dataset.open(server.url, options)
    assert not list((options.cache_root / "datasets").glob("*/manifest.json"))


def test_damage_in_the_cache_is_never_served(server, options, expected):
    dataset = Dataset.open(server.url, options)
    assert same_blocks(dataset, expected)
    files = [path for path in (options.cache_root / "blocks").rglob("*") if path.is_file()]
    blocks = [path for path in files if path.suffix != ".lock"]
    assert len(blocks) == len(expected)
    for number, path in enumerate(blocks):
        raw = bytearray(path.read_bytes())
        raw[number * 100 % len(raw)] ^= 1
        path.write_bytes(raw[: len(raw) // 2] if number % 3 == 0 else raw)
    assert same_blocks(dataset, expected)
    assert dataset.shards.counts.num_cache_damaged == len(blocks)
    (dataset.root / "blocks.npy").write_bytes(b"damaged")
    (dataset.root / "tokenizer" / "tokenizer.json").unlink()
    assert same_blocks(Dataset.open(server.url, options), expected)


def test_a_cut_off_shard_is_damaged_where_it_ends(server, options, expected):
    dataset = Dataset.open(server.url, replace(options, cache_bytes=0))
    shard = server.root / SHARD
    raw = shard.read_bytes()
    for nbytes in range(0, len(raw), 512 * 9):
        shard.write_bytes(raw[:nbytes])
        for index, block in enumerate(expected):
            row = dataset.blocks[index]
            if dataset.address_of(index).shard != SHARD or row["offset"] + row["nbytes"] <= nbytes:
                assert equal(dataset.read_block(index), block)
            else:
                with pytest.raises(DamagedBlock, match=SHARD) as error:
                    dataset.read_block(index)
                assert error.value.attempts == 1  # the server itself says where the file ends
    with pytest.raises(ValueError, match=SHARD):
        dataset.verify()
    shard.unlink()
    with pytest.raises(ValueError, match=rf"is damaged:\n  {SHARD}: .*HTTP 404"):
        dataset.verify()
