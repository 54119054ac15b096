"""The doctor finds nothing wrong with real text, and names every illness that is planted."""

import itertools
import re
import shutil
from pathlib import Path

import pytest
from people_support import command, corpus_texts, write_texts
from support import pick, tiny_preset

from data.prepare import PrepareConfig, prepare
from data.shards import Dataset
from launcher import doctor

FITTING = ("--num-lanes", 16)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English and Chinese Wikipedia, 1,000 and 300 articles."""
    folder = tmp_path_factory.mktemp("healthy")
    sources = {
        "en": write_texts(folder / "en.jsonl", corpus_texts("en_wiki", 1000)),
        "zh": write_texts(folder / "zh.jsonl", corpus_texts("zh_wiki", 300)),
    }
    return prepare(
        PrepareConfig(
            output=str(folder / "dataset"),
            sources={name: (str(path),) for name, path in sources.items()},
            vocab_size=6000,
            tokenizer_sample_bytes=1 << 20,
            heldout_fraction=0.03,
            block_tokens=1 << 16,
            num_processes=1,
        )
    )


@pytest.fixture
def ill(tmp_path: Path, healthy: Path):
    """Makes a dataset of texts, with the tokenizer of the healthy one unless told otherwise."""

    numbers = itertools.count()

    def make(texts: list[str], **options: object) -> Path:
        path = write_texts(tmp_path / "texts.jsonl", texts)
        settings = {
            "sources": {"text": (str(path),)},
            "tokenizer": str(healthy / "tokenizer"),
            "heldout_fraction": 0.05,
            "block_tokens": 8192,
        }
        output = str(tmp_path / f"ill{next(numbers)}")
        return prepare(PrepareConfig(output, num_processes=1, **{**settings, **options}))  # pyright: ignore[reportArgumentType]

    return make


def verdicts(text: str) -> dict[tuple[str, str], str]:
    """(check, of) -> verdict, from the printed table."""
    rows = re.findall(r"^(OK|WARNING|PROBLEM)  +(\S.*?)  +(\S.*?)  +\S", text, re.MULTILINE)
    return {(check, of): verdict for verdict, check, of in rows}


def named(text: str) -> set[str]:
    """The checks that found something."""
    return {check for (check, _), verdict in verdicts(text).items() if verdict != "OK"}


def advice(text: str, check: str) -> str:
    """The paragraph on a check, in one line."""
    found = re.search(rf"^(?:WARNING|PROBLEM): {check} .*?\n\n", text, re.MULTILINE | re.DOTALL)
    assert found, f"nothing is said of {check}"
    return " ".join(found[0].split())


def test_real_text_is_well(healthy: Path, tmp_path: Path, capsys) -> None:
    assert command(doctor, healthy, *FITTING, "--verify", "--steps", 5000) == 0
    text = capsys.readouterr().out
    assert "0 PROBLEM, 0 WARNING" in text, text
    found = verdicts(text)
    assert {("sentences", "zh"), ("byte tokens", "en"), ("near-copies", "all")} <= found.keys()
    preset = tiny_preset(tmp_path, healthy)
    assert command(doctor, preset, "--ranks", 2, "--workers", 2) == 0
    text = capsys.readouterr().out
    assert "0 PROBLEM, 0 WARNING" in text, text
    assert ("disk", "the run") in verdicts(text)


def test_text_without_sentence_ends(ill, capsys) -> None:
    texts = [re.sub(r"[^\w ]", " ", text) for text in corpus_texts("en_wiki", 200)]
    assert command(doctor, ill(texts), *FITTING) == 1
    text = capsys.readouterr().out
    assert verdicts(text)["sentences", "text"] == "PROBLEM"
    assert "no sentence ends that the splitter knows" in advice(text, "sentences")


def test_titles_instead_of_documents(ill, capsys) -> None:
    texts = [
        sentence
        for text in corpus_texts("en_wiki", 200)
        for sentence in re.split(r"(?<=\.)\s", text)
        if 20 < len(sentence) < 200
    ]
    assert command(doctor, ill(texts), *FITTING) == 1
    assert "Documents of one short sentence" in advice(capsys.readouterr().out, "sentences")


def test_words_instead_of_documents(ill, capsys) -> None:
    texts = [
        f"{a} {b}." for text in corpus_texts("en_wiki", 4)
        for a, b in itertools.pairwise(text.split())
    ]  # fmt: skip
    command(doctor, ill(texts), *FITTING)
    assert "short documents" in named(capsys.readouterr().out)


def test_a_tokenizer_of_another_language(ill, tiny_dataset: Path, tmp_path: Path, capsys) -> None:
    """Sentencepiece falls back to bytes, WordPiece to [UNK]."""
    from tokenizers import BertWordPieceTokenizer

    chinese = list(corpus_texts("zh_wiki", 60))
    dataset = ill(chinese, tokenizer=str(tiny_dataset / "tokenizer"))
    assert command(doctor, dataset, *FITTING) == 1
    text = capsys.readouterr().out
    assert verdicts(text)["byte tokens", "text"] == "PROBLEM"
    assert "made for another language" in advice(text, "byte tokens")
    english = BertWordPieceTokenizer()
    english.train_from_iterator(corpus_texts("en_wiki", 200), vocab_size=1000, show_progress=False)
    english.save(str(tmp_path / "tokenizer.json"))
    dataset = ill(chinese, tokenizer=str(tmp_path))
    assert command(doctor, dataset, *FITTING) == 1
    text = capsys.readouterr().out
    assert verdicts(text)["unknown tokens", "text"] == "PROBLEM"
    assert "Train a tokenizer on this text" in advice(text, "unknown tokens")


def test_a_file_given_twice(ill, tmp_path: Path, capsys) -> None:
    write_texts(tmp_path / "texts.jsonl", corpus_texts("en_wiki", 200))
    again = shutil.copy(tmp_path / "texts.jsonl", tmp_path / "again.jsonl")
    sources = {"text": (str(tmp_path / "texts.jsonl"),), "more": (str(again),)}
    dataset = ill(list(corpus_texts("en_wiki", 200)), sources=sources)
    assert command(doctor, dataset, *FITTING) == 1
    text = capsys.readouterr().out
    assert verdicts(text)["copies", "text"] == "PROBLEM"  # `more` comes first, by name
    assert "Was a file given twice" in advice(text, "copies")


def test_pages_made_from_a_template(ill, capsys) -> None:
    """A paragraph that is always the same, with another name and number: no two are equal."""
    paragraph = next(corpus_texts("en_wiki", 1))[:1500]
    words = "ant|bee|cat|dog|elk|fox|gnu|hen|ibis|jay"
    template = [f"Entry {pick(words, n)} {n}. {paragraph} Number {n * 7} ends." for n in range(400)]
    command(doctor, ill([*template, *corpus_texts("en_wiki", 100)]), *FITTING)
    text = capsys.readouterr().out
    assert "near-copies" in named(text) and "copies" not in named(text)
    assert "cloze corpus" in advice(text, "near-copies")


def test_a_page_of_dashes(ill, capsys) -> None:
    texts = [f"{n} {'- ' * 900} end. {n * n}." for n in range(100)]
    command(doctor, ill(texts), *FITTING)
    assert {"variety", "commonest token"} <= named(capsys.readouterr().out)


def test_blocks_that_are_too_few_or_too_small(ill, capsys) -> None:
    """3 blocks for 256 lanes; rows of 512 from blocks of three rows, each of a document or two."""
    texts = list(corpus_texts("en_wiki", 60))
    dataset = ill(texts, block_tokens=1 << 18)
    num_blocks = len(Dataset.open(dataset).block_indices("train"))
    assert num_blocks <= 3
    assert command(doctor, dataset, "--num-lanes", 256) == 1
    text = capsys.readouterr().out
    assert verdicts(text)["blocks against lanes", "all"] == "PROBLEM"
    assert f"{num_blocks} blocks for 256 lanes" in text
    assert "--block-tokens" in advice(text, "blocks against lanes")
    command(doctor, ill(texts, block_tokens=1536), *FITTING, "--sequence-length", 512)
    text = capsys.readouterr().out
    assert {"fill of rows", "next-sentence labels"} <= named(text)
    assert "larger --block-tokens" in advice(text, "next-sentence labels")


def test_files_that_were_changed(healthy: Path, tmp_path: Path, capsys) -> None:
    copy = Path(shutil.copytree(healthy, tmp_path / "copy"))
    shard = next(copy.glob("zh/train/*.tar"))
    with shard.open("r+b") as file:
        file.seek(3000)
        file.write(b"\xff\xff\xff\xff")
    assert command(doctor, copy, *FITTING) == 1
    assert verdicts(capsys.readouterr().out)["block hashes", "zh"] == "PROBLEM"
    assert command(doctor, copy, *FITTING, "--verify") == 1
    assert verdicts(capsys.readouterr().out)["completeness", "all"] == "PROBLEM"
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    assert command(doctor, copy, *FITTING) == 1
    assert "tokenizer/: the digest of its files" in advice(capsys.readouterr().out, "completeness")
    with pytest.raises(ValueError, match="no complete dataset is there"):
        command(doctor, tmp_path)


def test_numbers_of_a_run_that_do_not_fit(healthy: Path, tmp_path: Path, capsys) -> None:
    """Ranks, shared lanes, epochs, evaluation and disk: each is told, with the numbers."""
    shape = {"hidden_size": 32768, "num_hidden_layers": 90, "intermediate_size": 131072}
    weights = {"en": 1, "zh": 3}
    preset = tiny_preset(
        tmp_path,
        healthy,
        steps=200_000,
        eval_rows=100_000,
        micro_batch_size=8,
        data={"num_lanes": 8, "weights": weights},
        model=shape,
    )
    assert command(doctor, preset, "--ranks", 3) == 1
    text = capsys.readouterr().out
    found = verdicts(text)
    assert found["division", "the run"] == "PROBLEM" and found["disk", "the run"] == "PROBLEM"
    assert "3 ranks do not divide" in advice(text, "division")
    assert found["held-out split", "all"] == found["epochs", "zh"] == "WARNING"
    command(doctor, preset, "--workers", 4, "--sample-tokens", 100_000)
    text = capsys.readouterr().out
    assert verdicts(text)["lanes of workers", "the run"] == "WARNING"
    assert "multiple of 32 (ranks x workers x micro-batch)" in advice(text, "lanes of workers")
    preset = tiny_preset(tmp_path, healthy, data={"weights": {"en": 1, "fr": 1}})
    assert command(doctor, preset) == 1
    assert "data.weights names ['fr']" in advice(capsys.readouterr().out, "mixture")
