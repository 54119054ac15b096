"""Evaluation texts in the corpus: found in any file format and language, chance meetings let through."""

import json
from pathlib import Path

import pytest
from corpus_support import corpora, rows

from data.corpus.decontaminate import Decontaminate, evaluation_texts, index_of
from data.corpus.steps import Document

QUESTION = "Which of the many rivers in this small country flows into the northern sea at last ?"
CHINESE = (
    "这个小国的许多河流中，哪一条最后流入北海，并且在冬天结冰，给沿岸的渔民带来许多不便，请回答？"
)


def document(text: str) -> Document:
    return Document("x#0", text, {})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json.dumps({"data": [{"question": QUESTION, "id": "1"}]}) + "\n"),
        ("a.json", json.dumps({"paragraphs": [[QUESTION]]})),
        ("a.tsv", f'1\t0\t{QUESTION}\n2\t1\tA "quoted text\n'),
        ("a.csv", f'1,"{QUESTION}"\n'),
        ("a.txt", f"x\n{QUESTION}\n"),
        ("a.conll", "".join(f"{word} O\n" for word in QUESTION.split()) + "\nother O\n"),
    ],
)
def test_every_format(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    step = Decontaminate((str(path),))
    hit = step(document(f"Quoted: {QUESTION.upper()} And so on."))
    assert hit.text is None and hit.reason == "in_evaluation"
    assert name in hit.detail and "which of the many rivers" in hit.detail
    assert step(document("Which of the many rivers is long? " * 3)).text is not None
    flagged = Decontaminate((str(path),), drop=False)(document(QUESTION))
    assert flagged.text == QUESTION and flagged.metadata == {"contaminated": name}


def test_chinese_needs_more_words(tmp_path: Path) -> None:
    path = tmp_path / "zh.txt"
    path.write_text(CHINESE, encoding="utf-8")
    step = Decontaminate((str(path),))
    assert step(document(f"他问：{CHINESE}")).text is None
    assert step(document("这个小国的许多河流中，哪一条最后流入海。")).text is not None


def test_a_quotation_in_a_document_of_the_other_script(tmp_path: Path) -> None:
    path = tmp_path / "both.txt"
    path.write_text(f"{CHINESE}\n{QUESTION}\n", encoding="utf-8")
    step = Decontaminate((str(path),))
    english, chinese = "They say a thing or two about it. " * 30, "他们说了几句话。" * 80
    assert step(document(english)).text is not None and step(document(chinese)).text is not None
    assert step(document(english + CHINESE)).text is None
    assert step(document(chinese + QUESTION + chinese)).text is None


def test_short_texts_count_whole(tmp_path: Path) -> None:
    """A sentence or headline of less than n words is met as a whole or not at all."""
    path = tmp_path / "short.jsonl"
    texts = ["The boy that we met kicked the ball.", "The boy that we met kicked the can away .",
             "这座小城的居民昨天选出了新的市长", "Short label"]  # fmt: skip
    path.write_text("".join(json.dumps({"t": text}) + "\n" for text in texts), encoding="utf-8")
    step = Decontaminate((str(path),))
    for text in texts[:3]:
        hit = step(document(f"So: {text} 等等 and so on."))
        assert hit.text is None and "first" in hit.detail
    for text in ("The boy that we met kicked the cat.", "这座小城的居民昨天选出了新的", texts[3]):
        assert step(document(f"So: {text} and so on.")).text is not None
    assert index_of(step)[1:] == (4, 1)


def test_fields_of_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    row = {"context": CHINESE, "qas": [{"question": {"text": QUESTION}, "id": "x"}]}
    path.write_text(json.dumps({"data": [row]}), encoding="utf-8")
    step = Decontaminate((str(path),), fields=("question",))
    assert step(document(QUESTION)).text is None and step(document(CHINESE)).text == CHINESE
    with pytest.raises(ValueError, match=r"a\.json has no text of enough words in answer"):
        index_of(Decontaminate((str(path),), fields=("answer",)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a"\n', r"a\.jsonl, line 2 is not JSON"),
        ("a.json", b"[1,", r"a\.json is not JSON"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8"),
        ("a.txt", b"one two three\n", r"a\.txt has no text of enough words"),
    ],
)
def test_files_that_cannot_be_used(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    step = Decontaminate((str(tmp_path / name),))
    with pytest.raises(ValueError, match=message):
        step(document(QUESTION))


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    files = (str(tmp_path / "absent.txt"), str(tmp_path / "a.parquet"))
    with pytest.raises(
        ValueError, match=r"absent\.txt does not exist; .*parquet is none of .*must be 3 or more"
    ):
        Decontaminate(files, ngram=2)
    with pytest.raises(ValueError, match="files is empty"):
        Decontaminate(())


def test_real_evaluation_sets() -> None:
    """Paragraphs of an evaluation set are all found in documents that quote them; few others are hit."""
    (path,) = corpora("downstream/en/xquad/xquad.en.json.xz")
    step = Decontaminate((str(path),))
    texts = [text for text in evaluation_texts(str(path)) if len(text.split()) > 30]
    articles = [row["text"] for row in rows("en_wiki.jsonl.xz")[: len(texts)]]
    planted = [f"{a[:500]} {t} {a[500:900]}" for a, t in zip(articles, texts, strict=False)]
    assert all(step(document(text)).text is None for text in planted)
    assert sum(step(document(text)).text is None for text in articles) <= 0.02 * len(articles)


def test_real_chinese_evaluation_sets() -> None:
    (path,) = corpora("downstream/zh/cmrc2018/cmrc2018_dev.json.xz")
    step = Decontaminate((str(path),))
    texts = [text for text in evaluation_texts(str(path)) if len(text) > 100][:200]
    laws = [row["text"] for row in rows("zh_laws.jsonl.xz")[: len(texts)]]
    planted = [a[:300] + t + a[300:600] for a, t in zip(laws, texts, strict=False)]
    assert all(step(document(text)).text is None for text in planted)
    assert sum(step(document(text)).text is None for text in laws) <= 0.02 * len(laws)
