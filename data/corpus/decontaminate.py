"""Evaluation files in, an index of their n-grams out; a document in, whether it gives an evaluation away.

A document that has n words in a row with an evaluation text would let a model remember what it is
to be tested on. n is 13 as in Brown et al. 2020 (appendix C); words are those of
data/corpus/fingerprint.py, so in Chinese 13 characters, which law and set phrases share by
chance: `ngram_unspaced` (default 30) is for texts whose words are mostly single characters.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus.fingerprint import WORD, kinds_of_characters, ngram_hashes, word_hashes, words_of
from data.corpus.steps import Document, Verdict
from data.documents import open_stream
from data.inputs import COMPRESSIONS

MIN_LETTERS = 8  # of a string in JSON to be looked at: shorter ones are labels and names


@dataclass(frozen=True)
class Decontaminate:
    """Drops documents that share n words in a row with a text of `files`."""

    files: tuple[str, ...]  # .jsonl, .json, .tsv, .csv, .conll or .txt, each also compressed
    ngram: int = 13
    ngram_unspaced: int = 30
    drop: bool = True  # else only metadata "contaminated" is set

    def __post_init__(self) -> None:
        problems = [
            f"decontaminate.files: {f} does not exist" for f in self.files if not Path(f).is_file()
        ]
        if min(self.ngram, self.ngram_unspaced) < 3:
            problems.append("decontaminate.ngram and ngram_unspaced must be 3 or more")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def name(self) -> str:
        return "decontaminate"

    @cached_property
    def _index(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """n -> (sorted uint64 hashes, which file each is from)."""
        found: dict[int, list[tuple[np.ndarray, int]]] = {self.ngram: [], self.ngram_unspaced: []}
        for number, path in enumerate(self.files):
            for text in evaluation_texts(path):
                words = word_hashes(text)
                n = self._width(text)
                if len(words) >= n:
                    found[n].append((ngram_hashes(words, n), number))
        index = {}
        for n, parts in found.items():
            hashes = np.concatenate([part for part, _ in parts] or [np.zeros(0, dtype=np.uint64)])
            files = np.repeat([number for _, number in parts], [len(part) for part, _ in parts])
            hashes, first = np.unique(hashes, return_index=True)
            index[n] = (hashes, files[first].astype(np.int64))
        return index

    def _width(self, text: str) -> int:
        """Which of the two n a text is compared with: by whether most of its words are single characters."""
        codes = np.frombuffer(text[:2000].encode("utf-32-le", "surrogatepass"), dtype="<u4")
        kinds = kinds_of_characters()[codes]
        unspaced = int((kinds == WORD).sum())
        return self.ngram_unspaced if unspaced > int((kinds > 0).sum()) / 2 else self.ngram

    def __call__(self, document: Document) -> Verdict:
        words = word_hashes(document.text)
        n = self._width(document.text)
        hashes, files = self._index[n]
        if len(words) < n or len(hashes) == 0:
            return Verdict(document.text)
        mine = ngram_hashes(words, n)
        place = np.minimum(np.searchsorted(hashes, mine), len(hashes) - 1)
        hits = np.flatnonzero(hashes[place] == mine)
        if len(hits) == 0:
            return Verdict(document.text)
        first = int(hits[0])
        shared = words_of(document.text)[first : first + n]
        joined = ("" if n == self.ngram_unspaced else " ").join(shared)
        file = Path(self.files[int(files[place[first]])]).name
        detail = f"{len(hits)} x {n} words in a row are in {file}, first: {joined}"
        if self.drop:
            return Verdict(None, "in_evaluation", detail)
        return Verdict(document.text, changes={"contaminated": 1}, metadata={"contaminated": file})


def evaluation_texts(path: str) -> Iterator[str]:
    """All longer strings of an evaluation file, whatever their place in it."""
    compression = Path(path).suffix if Path(path).suffix in COMPRESSIONS else ""
    kind = Path(path.removesuffix(compression)).suffix
    with open_stream(path, compression) as stream:
        text = stream.read().decode("utf-8")
    if kind == ".json":
        yield from _strings(json.loads(text))
    elif kind == ".jsonl":
        for line in text.split("\n"):
            if line.strip():
                yield from _strings(json.loads(line))
    elif kind in (".tsv", ".csv"):
        delimiter = "\t" if kind == ".tsv" else ","
        quoting = csv.QUOTE_NONE if kind == ".tsv" else csv.QUOTE_MINIMAL
        for row in csv.reader(text.splitlines(), delimiter=delimiter, quoting=quoting):
            yield from _strings(row)
    elif kind == ".conll":
        for sentence in text.split("\n\n"):
            yield " ".join(line.split()[0] for line in sentence.splitlines() if line.strip())
    else:
        yield from text.split("\n")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if sum(map(str.isalpha, value)) >= MIN_LETTERS:
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
