"""Evaluation files in, an index of their n-grams out; a document in, whether it gives an evaluation away.

A document that has n words in a row with an evaluation text would let a model remember what it is
to be tested on. n is 13 as in Brown et al. 2020 (appendix C); words are those of
data/corpus/fingerprint.py. Where every character is a word, 13 of them are met by chance (the full
name of a parliament, the title of a law): there n is 26. A shorter evaluation text, a sentence or a
headline, counts if it is met whole and has `shortest` words; what is shorter still is not looked for.
"""

import csv
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.corpus.fingerprint import WORD, kinds_of_characters, ngram_hashes, word_hashes, words_of
from data.corpus.steps import Document, Verdict
from data.documents import open_stream
from data.inputs import COMPRESSIONS

FORMATS = (".jsonl", ".json", ".tsv", ".csv", ".conll", ".txt")


class Hit(NamedTuple):
    start: int  # first word
    num_words: int
    file: int  # its number


class Grams:
    """N-grams of the evaluation texts of one way of writing, to look up."""

    def __init__(self, n: int, shortest: int) -> None:
        self.n, self.shortest = n, min(n, shortest)
        self._texts: list[tuple[np.ndarray, int]] = []
        self._whole: dict[int, list[tuple[int, int, int]]] = {}  # of the first words of short texts

    def add(self, words: np.ndarray, file: int) -> bool:
        """Whether a text, as from `word_hashes`, is long enough to be found."""
        if len(words) >= self.n:
            self._texts.append((words, file))
        elif len(words) >= self.shortest:
            first = int(ngram_hashes(words[: self.shortest], self.shortest)[0])
            whole = int(ngram_hashes(words, len(words))[0])
            self._whole.setdefault(first, []).append((len(words), whole, file))
        return len(words) >= self.shortest

    def finish(self) -> None:
        words = np.concatenate([np.zeros(0, dtype=np.uint64), *(text for text, _ in self._texts)])
        sizes = np.array([len(text) for text, _ in self._texts], dtype=np.int64)
        files = np.array([file for _, file in self._texts], dtype=np.int64)
        self._texts.clear()
        hashes = ngram_hashes(words, self.n)  # of all texts at once, as if they were one
        ends = np.repeat(np.cumsum(sizes), sizes)[: len(hashes)]
        inside = np.arange(len(hashes)) + self.n <= ends
        long, first = np.unique(hashes[inside], return_index=True)
        self._files = np.repeat(files, sizes)[: len(hashes)][inside][first]
        self._long = HashSet(long)
        self._starts = HashSet(np.array(sorted(self._whole), dtype=np.uint64))

    def find(self, words: np.ndarray) -> list[Hit]:
        """Where a document, as from `word_hashes`, is the same; in no order."""
        hits = []
        if len(words) >= self.n:
            places, found = self._long.find(ngram_hashes(words, self.n))
            hits += [
                Hit(place, self.n, int(self._files[i]))
                for place, i in zip(places.tolist(), found.tolist(), strict=True)
            ]
        if len(words) >= self.shortest:
            mine = ngram_hashes(words, self.shortest)
            for place in self._starts.find(mine)[0].tolist():
                for length, whole, file in self._whole[int(mine[place])]:
                    part = words[place : place + length]
                    if len(part) == length and int(ngram_hashes(part, length)[0]) == whole:
                        hits.append(Hit(place, length, file))
        return hits


class HashSet:
    """Sorted hashes, uint64, and a table of their first bits that rules out most others at once."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        bits = min(26, max(8, (16 * len(values)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, dtype=bool)
        self._table[values >> self._shift] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places of those hashes that are in the set, their places in the set), int64."""
        places = np.flatnonzero(self._table[hashes >> self._shift])
        where = np.searchsorted(self._values, hashes[places])
        where[where == len(self._values)] = 0
        same = np.flatnonzero(self._values[where] == hashes[places])
        return places[same], where[same]


@dataclass(frozen=True)
class Decontaminate:
    """Drops documents that share n words in a row, or a whole shorter text, with `files`."""

    files: tuple[str, ...]  # .jsonl, .json, .tsv, .csv, .conll or .txt, each also compressed
    fields: tuple[str, ...] = ()  # of JSON whose texts are looked at, at any depth; none: all
    ngram: int = 13
    ngram_unspaced: int = 26
    shortest: int = 8
    shortest_unspaced: int = 16
    drop: bool = True  # else only metadata "contaminated" is set

    def __post_init__(self) -> None:
        problems = [] if self.files else ["decontaminate.files is empty"]
        for path in self.files:
            if not Path(path).is_file():
                problems.append(f"decontaminate.files: {path} does not exist")
            elif _kind(path)[0] not in FORMATS:
                problems.append(f"decontaminate.files: {path} is none of {' '.join(FORMATS)}")
        if min(self.ngram, self.ngram_unspaced, self.shortest, self.shortest_unspaced) < 3:
            problems.append("decontaminate: ngram and shortest must be 3 or more")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def name(self) -> str:
        return "decontaminate"

    def __call__(self, document: Document) -> Verdict:
        words = word_hashes(document.text)
        hits = sorted(hit for grams in index_of(self).grams for hit in grams.find(words))
        if not hits:
            return Verdict(document.text)
        file = Path(self.files[hits[0].file]).name
        if not self.drop:
            return Verdict(
                document.text, changes={"contaminated": 1}, metadata={"contaminated": file}
            )
        shared = words_of(document.text)[hits[0].start : hits[0].start + hits[0].num_words]
        joined = ("" if all(len(word) == 1 for word in shared) else " ").join(shared)
        detail = f"{len(hits)} times the same words as {file}, first {len(shared)}: {joined}"
        return Verdict(None, "in_evaluation", detail)


class EvaluationIndex(NamedTuple):
    grams: tuple[Grams, Grams]  # of spaced and unspaced writing
    num_texts: int  # different ones
    num_too_short: int  # of these, what is not looked for


@functools.lru_cache(maxsize=2)
def index_of(step: Decontaminate) -> EvaluationIndex:
    """The index of a step, made once in a process. ValueError: a file cannot be used."""
    grams = (
        Grams(step.ngram, step.shortest),
        Grams(step.ngram_unspaced, step.shortest_unspaced),
    )
    least_characters = min(2 * grams[0].shortest - 1, grams[1].shortest)
    num_texts = num_too_short = 0
    for number, path in enumerate(step.files):
        usable = False
        for text in dict.fromkeys(evaluation_texts(path, step.fields)):
            num_texts += 1
            long = len(text) >= least_characters
            long = long and grams[_is_unspaced(text)].add(word_hashes(text), number)
            num_too_short += not long
            usable |= long
        if not usable:
            where = f" in {', '.join(step.fields)}" if step.fields else ""
            raise ValueError(f"decontaminate.files: {path} has no text of enough words{where}")
    for part in grams:
        part.finish()
    return EvaluationIndex(grams, num_texts, num_too_short)


def _is_unspaced(text: str) -> bool:
    """Whether most of a text's words are single characters of scripts without spaces."""
    if text.isascii():
        return False
    codes = np.frombuffer(text[:2000].encode("utf-32-le", "surrogatepass"), dtype="<u4")
    kinds = kinds_of_characters()[codes]
    return int((kinds == WORD).sum()) > int((kinds > 0).sum()) / 2


def _kind(path: str) -> tuple[str, str]:
    """(format, compression) by the name."""
    compression = Path(path).suffix if Path(path).suffix in COMPRESSIONS else ""
    return Path(path.removesuffix(compression)).suffix, compression


def evaluation_texts(path: str, fields: tuple[str, ...] = ()) -> Iterator[str]:
    """All strings of an evaluation file, or those under some keys of JSON. ValueError: names the line."""
    kind, compression = _kind(path)
    with open_stream(path, compression) as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"decontaminate.files: {path} is not UTF-8: {error}") from error
    if kind == ".json":
        yield from _strings(_parsed(text, path), fields, not fields)
    elif kind == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield from _strings(_parsed(line, f"{path}, line {number}"), fields, not fields)
    elif kind in (".tsv", ".csv"):
        delimiter = "\t" if kind == ".tsv" else ","
        quoting = csv.QUOTE_NONE if kind == ".tsv" else csv.QUOTE_MINIMAL
        lines = text.replace("\r\n", "\n").split("\n")
        for row in csv.reader(
            (f"{line}\n" for line in lines), delimiter=delimiter, quoting=quoting
        ):
            yield from row
    elif kind == ".conll":
        for sentence in text.replace("\r\n", "\n").split("\n\n"):
            yield " ".join(line.split()[0] for line in sentence.split("\n") if line.strip())
    else:
        yield from text.split("\n")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"decontaminate.files: {where} is not JSON: {error}") from error


def _strings(value: Any, fields: Iterable[str], wanted: bool) -> Iterator[str]:
    """Strings at any depth of a JSON value: all if wanted, else those under the keys in fields."""
    if isinstance(value, str) and wanted:
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, fields, wanted or key in fields)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, fields, wanted)
