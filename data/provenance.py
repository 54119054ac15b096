"""A dataset and row origins in, the documents and the text of those rows out.

Documents are told by what is stored beside the shards (`meta/*.jsonl.zst`): the file and record they came
from, and their own id. Pairs are planned anew from lengths; rows are assembled only where text is asked for.
"""

import io
import json
from functools import cached_property
from typing import Any, NamedTuple, final

import numpy as np
import zstandard

from data.lanes import Origin
from data.masking import Masking, Vocabulary
from data.objectives import CAUSAL, DEFAULT_MIXTURE, Mixture, Recipe
from data.pairs import UNLABELLED
from data.rows import Row, RowPlan, make_rows, plan_rows
from data.sequences import CLS_BEFORE, lay_spans
from data.shards import SPLITS, Block, Dataset, meta_path
from data.storage import LocalShards

WORD_MARK = "▁"  # what sentencepiece puts before the first piece of a word
MAX_META_BYTES = 1 << 30  # of one compressed metadata file that is fetched
LABELS = {  # what the classes of a pair mean
    "nsp": ("next", "random"),
    "sop": ("next", "swapped"),
    "order": ("next", "swapped", "random"),
    "distance": ("next", "later", "random"),
}
LEGEND = (
    "[MASK:word] hidden, [other:word] replaced by another token, [=word] masked but left as it is"
)


class Making(NamedTuple):
    """How the rows of a phase are made."""

    sequence_length: int
    packing: bool
    masking: Masking
    mixture: Mixture = DEFAULT_MIXTURE


class Place(NamedTuple):
    """Where a piece of a pair lies: tokens [start, stop) of a document of a block."""

    block: int
    document: int  # of the block
    start: int  # within the document, or the part of it that the block holds
    stop: int


class Piece(NamedTuple):
    """A pair of a row."""

    label: str  # of LABELS, or "none"
    a: Place
    b: Place | None


@final
class Provenance:
    """Looks up rows of one dataset. Keeps the plan of the block it was asked for last."""

    def __init__(self, dataset: Dataset, making: Making) -> None:
        self.dataset, self.making = dataset, making
        self.vocabulary = Vocabulary.of(dataset.special_ids, dataset.vocab_size)
        self._key: tuple[int, int] | None = None
        self._planned: tuple[Block, RowPlan] | None = None

    def _plan(self, origin: Origin) -> tuple[Block, RowPlan]:
        if self._planned is None or self._key != (origin.block, origin.key):
            block = self.dataset.read_block(origin.block)
            making = self.making
            plan = plan_rows(
                block, making.sequence_length, making.packing, origin.key, making.mixture
            )
            self._key, self._planned = (origin.block, origin.key), (block, plan)
        return self._planned

    def recipe(self, origin: Origin) -> Recipe:
        """What a row is made for."""
        _, plan = self._plan(origin)
        return plan.mixture.recipes[plan.recipes[origin.row]]

    def pieces(self, origin: Origin) -> list[Piece]:
        """The pairs of a row, in its order."""
        block, plan = self._plan(origin)
        ends = np.cumsum(block.document_lengths, dtype=np.int64)
        names, found = LABELS.get(self.recipe(origin).paired or "", ()), []
        for pair in plan.order[plan.starts[origin.row] : plan.starts[origin.row + 1]].tolist():
            a, b = (
                _place(origin.block, ends, int(start[pair]), int(length[pair]))
                for start, length in (
                    (plan.pairs.a_start, plan.pairs.a_length),
                    (plan.pairs.b_start, plan.pairs.b_length),
                )
            )
            assert a is not None
            label = int(plan.pairs.label[pair])
            found.append(Piece("none" if label == UNLABELLED else names[label], a, b))
        return found

    def row(self, origin: Origin) -> Row:
        """The row as it was trained on, masked."""
        block, plan = self._plan(origin)
        numbers = range(origin.row, origin.row + 1)
        rows = make_rows(block, plan, numbers, self.vocabulary, self.making.masking, origin.key)
        return rows.row(0)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.dataset.root / "tokenizer" / "tokenizer.json"))

    def texts(self, origin: Origin) -> list[tuple[str, str]]:
        """(A, B) of each pair of a row as it is shown, decoded, with what was masked in place: see LEGEND.

        What lies in sequences of their own (of distance and cpc) comes behind B, after a bar.
        """
        row = self.row(origin)
        words = self._hidden(origin, row)
        stops = np.cumsum(row.sequence_lengths).tolist()
        found: list[tuple[str, str]] = []
        for is_first, start, stop in zip(
            self._begins_pair(origin), [0, *stops], stops, strict=False
        ):
            middle = start + int((row.token_type_ids[start:stop] == 0).sum())
            a, b = (
                self._shown(row, words, first, self._text_end(row, first, last))
                for first, last in ((start + 1, middle), (middle, stop))
            )
            if is_first:
                found.append((a, b))
            else:
                found[-1] = (found[-1][0], f"{found[-1][1]} | {a}")
        return found

    def _begins_pair(self, origin: Origin) -> list[bool]:
        """Of each sequence of a row: whether it is the first of its pair."""
        _, plan = self._plan(origin)
        chosen = plan.order[plan.starts[origin.row] : plan.starts[origin.row + 1]]
        recipes = np.full(len(chosen), plan.recipes[origin.row])
        marks = lay_spans(
            plan.pairs, chosen, recipes, plan.mixture, plan.boundaries, origin.key
        ).marks
        counts = (marks & CLS_BEFORE > 0).sum(axis=1)
        return [number == 0 for count in counts.tolist() for number in range(count)]

    def _text_end(self, row: Row, start: int, stop: int) -> int:
        """`stop`, or one less where a [SEP] stands before it."""
        ends_with_sep = stop > start and row.input_ids[stop - 1] == self.vocabulary.sep_id
        return stop - ends_with_sep

    def masked(self, origin: Origin) -> list[dict[str, Any]]:
        """What was masked in a row: its slot, the token that stood there, and the one that is shown."""
        row = self.row(origin)
        name = self._tokenizer.id_to_token
        return [
            {"slot": slot, "token": name(label), "shown": name(int(row.input_ids[slot]))}
            for slot, label in self._hidden(origin, row).items()
        ]

    def _hidden(self, origin: Origin, row: Row) -> dict[int, int]:
        """Slot -> the token that stood there. Rows that ask for the next tokens hide none."""
        if self.recipe(origin).tokens in CAUSAL:
            return {}
        return dict(zip(row.masked_positions.tolist(), row.masked_labels.tolist(), strict=True))

    def _shown(self, row: Row, words: dict[int, int], start: int, stop: int) -> str:
        """Text of slots [start, stop). Decoded at once: a character may take several tokens."""
        hidden = [position for position in range(start, stop) if position in words]
        ids = row.input_ids[start:stop].tolist()
        for position in hidden:
            ids[position - start] = self.vocabulary.mask_id
        marks = [self._mark(int(row.input_ids[position]), words[position]) for position in hidden]
        between = self._tokenizer.decode(ids, skip_special_tokens=False).split("[MASK]")
        if len(between) != len(marks) + 1:  # the text itself spells [MASK]
            plain = [
                words.get(position, int(row.input_ids[position])) for position in range(start, stop)
            ]
            return f"{self._tokenizer.decode(plain)}  {' '.join(marks)}"
        return "".join(text for pair in zip(between, [*marks, ""], strict=True) for text in pair)

    def _mark(self, shown: int, word: int) -> str:
        name, piece = self._word(word), str(self._tokenizer.id_to_token(word))
        space = " " if piece[0] == WORD_MARK and len(piece) > 1 else ""
        if shown == self.vocabulary.mask_id:
            return f"{space}[MASK:{name}]"
        return f"{space}[={name}]" if shown == word else f"{space}[{self._word(shown)}:{name}]"

    def _word(self, token: int) -> str:
        text = self._tokenizer.decode([token]).strip()
        return text if text and "\ufffd" not in text else str(self._tokenizer.id_to_token(token))


def _place(block: int, ends: np.ndarray, start: int, length: int) -> Place | None:
    if length == 0:
        return None
    document = int(np.searchsorted(ends, start, side="right"))
    first = int(ends[document - 1]) if document else 0
    return Place(block, document, start - first, start - first + length)


def find_documents(dataset: Dataset, places: set[tuple[int, int]]) -> dict[tuple[int, int], dict]:
    """{(block, document of the block): what is stored of it}, each metadata file read once.

    The values: "source", "file", "record", "id" (its own, or None) and "document_id". FileNotFoundError
    naming the file where metadata were not copied with the shards; ValueError where they are of other shards.
    """
    by_file: dict[str, dict[int, tuple[int, int]]] = {}
    for block, document in sorted(places):
        path, first = _meta_of(dataset, block)
        by_file.setdefault(path, {})[first + document] = (block, document)
    found = {}
    for path, wanted in by_file.items():
        for number, line in enumerate(_meta_lines(dataset, path)):
            if number in wanted:
                value = json.loads(line)
                block = wanted[number][0]
                source = dataset.sources[int(dataset.blocks[block]["source"])]
                names = ("file", "record", "id", "document_id")
                found[wanted[number]] = {"source": source, **{name: value[name] for name in names}}
                if number == max(wanted):
                    break
        if missing := set(wanted.values()) - found.keys():
            raise ValueError(f"{dataset.place}/{path} ends before {len(missing)} of the documents")
    return found


def _meta_of(dataset: Dataset, block: int) -> tuple[str, int]:
    """(metadata file, line of the block's first document)."""
    table, own = dataset.blocks, dataset.blocks[block]
    first = block
    place = [own[name] for name in ("source", "split", "shard")]
    while first > 0 and [table[first - 1][name] for name in ("source", "split", "shard")] == place:
        first -= 1
    path = meta_path(dataset.sources[int(place[0])], SPLITS[int(place[1])], int(place[2]))
    return path, int(table["num_documents"][first:block].sum(dtype=np.int64))


def _meta_lines(dataset: Dataset, path: str) -> io.TextIOWrapper:
    if isinstance(dataset.shards, LocalShards):
        file: Any = open(dataset.root / path, "rb")  # noqa: SIM115  closed with the reader
    else:
        from data.remote import RemoteShards

        assert isinstance(dataset.shards, RemoteShards)
        file = io.BytesIO(dataset.shards.read_whole(path, MAX_META_BYTES))
    reader = zstandard.ZstdDecompressor().stream_reader(file, closefd=True)
    return io.TextIOWrapper(reader, encoding="utf-8", newline="\n")
