"""Fixtures of the whole suite."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import write_corpus

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, 1,500 documents, blocks of 4,096 tokens; about 20 training blocks."""
    from data.prepare import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("tiny")
    first = write_corpus(folder / "first.jsonl", 1000)
    second = write_corpus(folder / "second.jsonl", 500, start=5000)
    return prepare(
        PrepareConfig(
            output=str(folder / "dataset"),
            sources={"first": (str(first),), "second": (str(second),)},
            vocab_size=360,
            heldout_fraction=0.05,
            block_tokens=4096,
            num_processes=2,
        )
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small wait for their threads longer than they compute, beside other tests above all."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
