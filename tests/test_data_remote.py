"""Remote datasets: the same blocks as from a folder, by few requests, from threads and processes."""

import json
import multiprocessing
import pickle
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fault_server import Fault, FaultServer
from remote_support import SHARD, blocks_of, equal, quick_options, same_blocks
from shard_support import make_dataset

from data.http_ranges import basic
from data.manifest import sealed
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


def test_a_remote_dataset_is_the_local_one(server, options, original, expected):
    local, dataset = Dataset.open(original), Dataset.open(server.url + "/", options)
    assert dataset.digest == local.digest and np.array_equal(dataset.blocks, local.blocks)
    assert isinstance(dataset.blocks, np.memmap)
    assert (dataset.root / "tokenizer" / "tokenizer.json").read_text() == "{}"
    assert dataset.place == server.url
    assert same_blocks(dataset, expected)
    assert len({request.connection for request in server.requests}) == 1  # kept alive
    dataset.verify()


def test_the_first_block_costs_its_own_bytes(server, options):
    dataset = Dataset.open(server.url, options)
    assert not any(request.path.endswith(".tar") for request in server.requests)
    before = server.num_bytes
    dataset.read_block(1)
    assert server.num_bytes - before == int(dataset.blocks[1]["nbytes"])
    small = sum(
        path.stat().st_size
        for path in server.root.rglob("*")
        if path.suffix in (".json", ".npy") and path.parent.name != "meta"
    )
    assert before == small


def test_opening_again_fetches_the_manifest_only(server, options, expected):
    assert same_blocks(Dataset.open(server.url, options), expected)
    server.requests.clear()
    dataset = Dataset.open(server.url, options)
    assert same_blocks(dataset, expected)
    assert [request.path for request in server.requests] == ["manifest.json"]


def test_ten_thousand_shards_are_not_asked_for(server, options):
    Dataset.open(server.url, options)
    num_requests = len(server.requests)
    manifest = json.loads((server.root / "manifest.json").read_text())
    shards = manifest["sources"]["src"]["train"]["shards"]
    shards += [
        {**shards[0], "path": f"src/train/src-train-{number:06d}.tar"}
        for number in range(len(shards), 10_000)
    ]
    (server.root / "manifest.json").write_text(json.dumps(sealed(manifest)))
    server.requests.clear()
    Dataset.open(server.url, options)
    assert len(server.requests) == num_requests


def test_a_dataset_prepared_anew_is_fetched_anew(server, options, tmp_path):
    first = Dataset.open(server.url, options)
    shutil.rmtree(server.root)
    make_dataset(server.root, "u32")
    second = Dataset.open(server.url, options)
    assert second.digest != first.digest and second.root != first.root
    assert second.read_block(0).tokens.dtype == np.uint32
    assert np.array_equal(first.blocks["num_tokens"], second.blocks["num_tokens"])


def test_two_sources_with_equal_names_share_a_cache(server, options, expected):
    for name in ("a", "b"):
        shutil.copytree(server.root / "src", server.root / name / "src")
        for file in ("manifest.json", "blocks.npy"):
            shutil.copy(server.root / file, server.root / name / file)
        shutil.copytree(server.root / "tokenizer", server.root / name / "tokenizer")
    for name in ("a", "b"):
        assert same_blocks(Dataset.open(f"{server.url}/{name}", options), expected)
        assert server.asked(f"{name}/{SHARD}")  # neither reads what the other has fetched


def test_without_a_block_cache_nothing_is_kept(server, options, expected):
    dataset = Dataset.open(server.url, replace(options, cache_bytes=0))
    assert same_blocks(dataset, expected) and same_blocks(dataset, expected)
    assert len(server.asked(SHARD)) == 2 * sum(
        dataset.blocks["shard"][dataset.block_indices("train")] == 0
    )
    assert not (options.cache_root / "blocks").exists()


def test_threads_share_a_dataset(server, options, expected):
    dataset = Dataset.open(server.url, replace(options, cache_bytes=20_000))
    server.script[SHARD] = [Fault("reset"), None, Fault("flip"), None, None, Fault("status", 503)]
    order = np.random.default_rng(0).integers(0, len(expected), 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        blocks = list(pool.map(dataset.read_block, order))
    assert all(equal(block, expected[index]) for index, block in zip(order, blocks, strict=True))
    assert threading.active_count() < 30


def read_in_worker(dataset: Dataset, indices: list[int]) -> list[Block]:
    return [dataset.read_block(index) for index in indices]


def failure_in_worker(dataset: Dataset) -> None:
    dataset.read_block(0)


@pytest.mark.parametrize("method", ["forkserver", "fork"])
@pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")
def test_processes_read_what_was_opened_before(server, options, expected, method):
    dataset = Dataset.open(server.url, replace(options, cache_bytes=0))
    assert equal(dataset.read_block(0), expected[0])  # a connection is open when the process forks
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = [pool.apply_async(read_in_worker, (dataset, [0, 1, 2, 3])) for _ in range(4)]
        for result in results:
            assert all(equal(a, b) for a, b in zip(result.get(60), expected, strict=False))
        server.always[SHARD] = Fault("flip")
        with pytest.raises(DamagedBlock, match="block 0") as error:
            pool.apply_async(failure_in_worker, (dataset,)).get(60)
    assert (error.value.index, error.value.attempts) == (0, 3)
    server.always.clear()
    assert equal(dataset.read_block(1), expected[1])


def test_processes_open_at_once_and_fetch_once(server, options):
    with multiprocessing.get_context("forkserver").Pool(3) as pool:
        results = [pool.apply_async(Dataset.open, (server.url, options)) for _ in range(6)]
        assert len({result.get(60).digest for result in results}) == 1
    assert len(server.asked("blocks.npy")) == 1


def test_a_pickled_remote_dataset(server, options, expected):
    url = server.url.replace("://", "://me:hunter2@")
    copy = pickle.loads(pickle.dumps(Dataset.open(url, options)))
    assert same_blocks(copy, expected)
    assert server.requests[-1].authorization == server.requests[0].authorization is not None


def test_a_password_comes_from_netrc(server, options, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    Dataset.open(server.url, options)
    assert server.requests[-1].authorization is None
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter%2\n")
    assert same_blocks(Dataset.open(server.url, options), expected)
    assert server.requests[-1].authorization == basic("me:hunter%252")
    (tmp_path / "netrc").write_text("hunter2")
    with pytest.raises(ValueError, match=r"is no netrc file: NetrcParseError$"):
        Dataset.open(server.url, options)


def test_a_proxy_of_the_environment_is_used(server, options, expected, monkeypatch):
    """A plain proxy gets the whole URL; our server takes the path of it."""
    monkeypatch.setenv("http_proxy", server.url.replace("://", "://me:hunter2@"))
    monkeypatch.setenv("no_proxy", "localhost")
    assert same_blocks(Dataset.open("http://dataset.invalid", options), expected)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A key and a certificate for 127.0.0.1 that no authority has signed."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", path, "-out", path.with_name("certificate.pem"), "-days", "2", "-subj", "/CN=test",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    with open(path, "ab") as file:
        file.write(path.with_name("certificate.pem").read_bytes())
    return path


def test_https(original, options, expected, certificate, monkeypatch):
    with (
        FaultServer.serving(original, certificate) as server,
        FaultServer.serving(original) as proxy,
    ):
        with pytest.raises(Unreachable, match=r"certificate is not valid.*SSL_CERT_FILE") as error:
            Dataset.open(server.url, options)
        assert error.value.attempts == 1
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        options = replace(options, cache_bytes=0)
        dataset = Dataset.open(server.url, options)
        server.script[SHARD] = [Fault("reset"), Fault("short"), Fault("silent_close")]
        assert same_blocks(dataset, expected)
        monkeypatch.setenv("https_proxy", proxy.url.replace("://", "://me:hunter2@"))
        monkeypatch.setenv("no_proxy", "")
        assert same_blocks(Dataset.open(server.url, options), expected)
        assert [request.path for request in proxy.requests] == [server.url.removeprefix("https://")]
        assert proxy.requests[0].authorization == basic("me:hunter2")


def test_loader_workers_read_a_remote_dataset(tiny_dataset, tmp_path, monkeypatch):
    from data.batch import Reader, build_loader  # torch is needed by this test only
    from data.lanes import DataConfig, StreamState

    monkeypatch.setenv("CLOZE_CACHE", str(tmp_path / "cache"))
    reader = Reader(rank=0, world_size=1, micro_batch_size=4, global_batch_size=16, seed=0)
    with FaultServer.serving(tiny_dataset) as server:
        batches = {}
        for path in (str(tiny_dataset), server.url):
            config = DataConfig(path, sequence_length=64, num_lanes=16, num_workers=2)
            loader = build_loader(config, reader, StreamState.start(16, 1))
            batches[path] = [next(loader).batch.input_ids for _ in range(8)]
            del loader
        assert server.requests
    first, second = batches.values()
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_any_fsspec_store_will_do(original, options, expected):
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(str(original), "/bucket/set", recursive=True)
    dataset = Dataset.open("memory://bucket/set", options)
    assert same_blocks(dataset, expected)
    dataset.verify()
    shutil.rmtree(options.cache_root)
    raw = store.cat_file(f"/bucket/set/{SHARD}")
    store.pipe_file(f"/bucket/set/{SHARD}", raw[:100])
    with pytest.raises(DamagedBlock, match="block 1"):
        dataset.read_block(1)
    store.rm(f"/bucket/set/{SHARD}")
    with pytest.raises(
        UnreachableBlock, match=f"block 0: memory://bucket/set/{SHARD}.*no such object"
    ):
        dataset.read_block(0)
    store.rm("/bucket", recursive=True)


@pytest.fixture
def bucket(monkeypatch):
    """An S3 server of this machine."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    yield "bucket"
    server.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_s3(bucket, original, options, expected):
    import fsspec

    store = fsspec.filesystem("s3")
    store.mkdir(bucket)
    store.put(str(original), f"{bucket}/set", recursive=True)
    dataset = Dataset.open(f"s3://{bucket}/set", options)
    assert same_blocks(dataset, expected)
    copy = pickle.loads(pickle.dumps(dataset))
    with ThreadPoolExecutor(4) as pool:
        blocks = list(pool.map(replace_cache(copy, options).read_block, range(len(expected))))
    assert all(equal(a, b) for a, b in zip(blocks, expected, strict=True))
    shutil.rmtree(options.cache_root / "blocks")
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        blocks = pool.apply_async(read_in_worker, (dataset, [0, 1])).get(60)
    assert all(equal(a, b) for a, b in zip(blocks, expected, strict=False))
    shutil.rmtree(options.cache_root / "blocks")
    raw = store.cat_file(f"{bucket}/set/{SHARD}")
    store.pipe_file(f"{bucket}/set/{SHARD}", raw[:8000])
    for index in (1, 2):  # cut inside the block; cut before it
        with pytest.raises(DamagedBlock, match=f"block {index} .s3://bucket/set/{SHARD}"):
            dataset.read_block(index)
    store.rm(f"{bucket}/set/{SHARD}")
    with pytest.raises(UnreachableBlock, match="no such object"):
        dataset.read_block(0)
    with pytest.raises(ValueError, match=r"s3://bucket/nothing/ has no manifest\.json"):
        Dataset.open(f"s3://{bucket}/nothing", options)


def replace_cache(dataset: Dataset, options: StorageOptions) -> Dataset:
    """The dataset, reading without a cache."""
    return Dataset.open(dataset.place, replace(options, cache_bytes=0))
