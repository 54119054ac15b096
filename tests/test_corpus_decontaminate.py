"""Evaluation texts in the corpus: found in any file format and language, chance meetings let through."""

import json
from pathlib import Path

import pytest
from corpus_support import corpora, rows

from data.corpus.decontaminate import Decontaminate, evaluation_texts
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


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.txt does not exist; .*must be 3 or more"):
        Decontaminate((str(tmp_path / "absent.txt"),), ngram=2)


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
