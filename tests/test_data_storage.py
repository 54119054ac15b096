"""Storage: options and URLs are checked, nothing tells a secret, and the block cache keeps its promises."""

import dataclasses
import multiprocessing
import os
import warnings
from pathlib import Path

import pytest
import xxhash

from data.cache import BlockCache, block_name, locked
from data.files import TEMPORARY_MARK
from data.http_answers import check_content_range, redirected, retry_after
from data.remote import backoff_seconds
from data.shards import Dataset, StorageOptions
from data.transfer import Refused, TransferFault, WrongBytes, is_url, parse_location, redact


def test_options_tell_all_that_is_wrong_at_once():
    with pytest.raises(ValueError) as error:
        StorageOptions(cache_dir="", cache_bytes=-1, num_retries=-2, timeout_seconds=0)
    for name in ("cache_dir", "cache_bytes is -1", "num_retries is -2", "timeout_seconds is 0"):
        assert f"storage.{name}" in str(error.value)
    with pytest.raises(
        ValueError, match=r"first_backoff_seconds 9 is over .*max_backoff_seconds 3"
    ):
        StorageOptions(first_backoff_seconds=9, max_backoff_seconds=3)
    assert dataclasses.replace(StorageOptions(), num_retries=0, cache_bytes=0).num_retries == 0


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("CLOZE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert StorageOptions().cache_root == tmp_path / "home" / "cloze"
    monkeypatch.setenv("CLOZE_CACHE", str(tmp_path / "variable"))
    assert StorageOptions().cache_root == tmp_path / "variable"
    assert StorageOptions(cache_dir=str(tmp_path / "option")).cache_root == tmp_path / "option"


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("/data/set", False),
        ("data/set", False),
        (Path("C:/data"), False),
        ("s3://bucket/set", True),
        ("HTTPS://host/set", True),
        ("memory://set", True),
    ],
)
def test_what_is_a_url(root, expected):
    assert is_url(root) is expected


def test_a_url_that_went_through_a_path_is_told():
    with pytest.raises(ValueError, match="https:/host/set has one slash") as error:
        Dataset.open(Path("https://user:hunter2@host/set"))
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("file:///data/set", "on this machine"),
        ("http://", "names no host"),
        ("s3://key:hunter2@bucket/set", "carries a user"),
        ("https://host/set/manifest.json?sig=hunter2", "names a file"),
        ("nonsense://host/set", "nonsense:// is not read; http, https, s3 and gs are"),
        ("https://me:hunter2/x@host/set", "port that is no number"),
        ("https://host/set#a", "has a #"),
    ],
)
def test_urls_that_cannot_be_opened(url, problem):
    with pytest.raises(ValueError, match=problem) as error:
        Dataset.open(url)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs")])
def test_a_missing_package_names_the_extra(scheme, extra, monkeypatch):
    import fsspec

    def absent(protocol: str) -> None:
        raise ImportError("not installed")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    with pytest.raises(ValueError, match=rf"{scheme}:// needs .*pip install 'cloze\[{extra}\]'"):
        Dataset.open(f"{scheme}://bucket/set")


def test_secrets_stay_in_requests():
    location = parse_location("https://me:hunter2@host:8443/a%20b/set/?sig=topsecret")
    assert (
        location.url_of("src/x y.tar") == "https://host:8443/a%20b/set/src/x%20y.tar?sig=topsecret"
    )
    assert parse_location("http://host/数 据").url_of("文.tar").isascii()
    assert location.shown("src/x.tar") == "https://host:8443/a%20b/set/src/x.tar?..."
    for text in (
        repr(location),
        str([location]),
        redact("https://me:hunter2@host/set?sig=topsecret"),
    ):
        assert "hunter2" not in text and "topsecret" not in text and "host" in text


def test_a_password_is_not_told_to_another_host():
    headers = {"Authorization": "Basic x", "Range": "bytes=0-1"}
    assert redirected("http://a/x", "/y", headers) == ("http://a/y", headers)
    assert redirected("http://a/x", "http://b/y", headers) == ("http://b/y", {"Range": "bytes=0-1"})
    for target in ("http://b/y", "ftp://b/y", "file:///etc/passwd", ""):
        with pytest.raises(Refused):
            redirected("https://a/x", target, headers)


def test_content_ranges():
    check_content_range("bytes 10-19/100", 10, 10)
    check_content_range("bytes 10-19/*", 10, 10)
    for wrong in (None, "", "bytes 11-20/100", "bytes 10-20/100", "items 10-19/100"):
        with pytest.raises(TransferFault):
            check_content_range(wrong, 10, 10)
    with pytest.raises(WrongBytes, match="15 bytes only") as error:
        check_content_range("bytes 10-14/15", 10, 10)
    assert error.value.final
    with pytest.raises(WrongBytes) as error:
        check_content_range("bytes 10-14/100", 10, 10)
    assert not error.value.final


def test_waits_grow_and_obey_the_server_within_the_limit():
    options = StorageOptions(first_backoff_seconds=1, max_backoff_seconds=20)
    waits = [backoff_seconds(options, attempts, "a file", None) for attempts in range(1, 9)]
    for attempts, wait in enumerate(waits, start=1):
        assert min(2 ** (attempts - 2), 20) <= wait <= min(2 ** (attempts - 1), 20)
    assert backoff_seconds(options, 1, "a file", 12.0) == 12.0
    assert backoff_seconds(options, 1, "a file", 3600.0) == 20.0
    assert retry_after("7") == 7.0 and retry_after("soon") is None and retry_after(None) is None
    assert retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0.0


def put(cache: BlockCache, number: int, nbytes: int = 1000) -> str:
    data = bytes([number]) * nbytes
    name = block_name("https://host/set/x.tar", number, nbytes, xxhash.xxh3_64_intdigest(data))
    cache.put(name, data)
    return name


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_the_cache_gives_what_was_put_and_is_bounded(tmp_path):
    cache = BlockCache(tmp_path, 10_000)
    names = []
    for number in range(40):
        names.append(put(cache, number))
        assert sum(path.stat().st_size for path in files_of(tmp_path)) <= 10_000
        assert cache.get(names[-1]) == bytes([number]) * 1000
        os.utime(tmp_path / names[-1][:2] / names[-1], (number, number))  # used long ago
        if number > 3:
            assert cache.get(names[3]) == bytes([3]) * 1000  # used now, so never the oldest
    assert cache.get(names[0]) is None
    assert cache.get("0" * 49) is None


def test_a_cache_of_no_bytes_keeps_nothing(tmp_path):
    put(BlockCache(tmp_path / "cache", 0), 1)
    put(BlockCache(tmp_path / "cache", 500), 1)  # larger than all of the cache
    assert not (tmp_path / "cache").exists()


def test_sources_with_equal_file_names_do_not_meet():
    place = ("a/train/000000.tar", "b/train/000000.tar")
    first, second = (block_name(f"s3://bucket/{path}", 0, 512, 7) for path in place)
    assert first != second
    assert block_name("s3://bucket/x", 0, 512, 7) != block_name("s3://bucket/x", 0, 512, 8)


def test_what_a_killed_process_left_goes(tmp_path):
    cache = BlockCache(tmp_path, 10_000)
    name = put(cache, 1)
    left = tmp_path / name[:2] / f"{name}{TEMPORARY_MARK}1-1"
    fresh = tmp_path / name[:2] / f"{name}{TEMPORARY_MARK}2-1"
    for path in (left, fresh):
        path.write_bytes(b"half")
    os.utime(left, (1, 1))
    cache.evict()
    assert not left.exists() and fresh.exists() and cache.get(name) is not None


def test_a_disk_that_refuses_is_told_once_and_reading_goes_on(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = BlockCache(tmp_path / "file" / "cache", 10_000)
    with pytest.warns(RuntimeWarning, match="block cache: .*cannot be written"):
        put(cache, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        put(cache, 2)


def churn(folder: str, seed: int) -> None:
    """Put and get the same blocks as other processes, while all of them evict."""
    cache = BlockCache(Path(folder), 20_000)
    for turn in range(300):
        number = (turn * 7 + seed) % 60
        data = bytes([number]) * 1000
        name = block_name("https://h/x.tar", number, 1000, xxhash.xxh3_64_intdigest(data))
        found = cache.get(name)
        assert found is None or found == data
        if found is None:
            cache.put(name, data)


def test_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("forkserver")
    workers = [context.Process(target=churn, args=(str(tmp_path), seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    BlockCache(tmp_path, 20_000).evict()
    files = files_of(tmp_path)
    assert files and sum(path.stat().st_size for path in files) <= 20_000
    assert not [path for path in files if TEMPORARY_MARK in path.name]


def test_a_lock_is_held_by_one(tmp_path):
    with locked(tmp_path / "a.lock", wait=False) as first:
        assert first
        with locked(tmp_path / "a.lock", wait=False) as second:
            assert not second
    with locked(tmp_path / "a.lock", wait=False) as third:
        assert third
