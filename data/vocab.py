"""Text in, token ids out, with the sentence each token belongs to and whether it starts a word.

Ours is sentencepiece (unigram by default: 4 times the speed of BPE on English); any fast Hugging Face
tokenizer with the five special tokens may be used instead.
"""

from pathlib import Path
from typing import Literal, NamedTuple, final

import numpy as np
import sentencepiece
import tokenizers

from data.files import names_digest
from data.shards import cut_sentence_lengths
from data.tokenizer_hf import SPECIAL_TOKENS, model_kind, read_model

MODEL_FILE = "sentencepiece.model"
TOKENIZER_FILES = (  # all that may make up a tokenizer; a model's folder holds much else
    MODEL_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
Kind = Literal["unigram", "bpe", "hf"]
# Characters that every sentencepiece model of ours normalises to a space. A text that is cut beside one
# has the ids of its two sides, because no piece but its first character is ever a space.
SPACES = frozenset(" \n\t\r\u3000")
WORD_MARK = "\u2581"
WORD_MARKS = (WORD_MARK, "\u0120")  # of sentencepiece, and of byte-level BPE


class Encoded(NamedTuple):
    """A document in n tokens and k sentences."""

    ids: np.ndarray  # [n] uint32, never a special id other than [UNK]
    sentence_lengths: np.ndarray  # [k] uint16, each at least 1, sums to n
    word_starts: np.ndarray  # [n] bool


class _Tokens(NamedTuple):
    ids: np.ndarray  # [n] uint32
    sentences: np.ndarray  # [n] int64, ascending: the sentence each token belongs to
    word_starts: np.ndarray  # [n] bool


@final
class Tokenizer:
    """A tokenizer folder, loaded. `digest`: xxh3_128 over the names and bytes of its files, hex."""

    def __init__(self, folder: Path, model: "_SentencePiece | _HuggingFace") -> None:
        self.folder = folder
        self.kind: Kind = model.kind
        self.vocab_size = model.vocab_size
        self.special_ids = model.special_ids  # "[PAD]" -> id, all of SPECIAL_TOKENS
        self.digest = names_digest(folder, tokenizer_files(folder))
        self._model = model

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Open a folder of ours, or of a fast Hugging Face tokenizer.

        ValueError: no tokenizer there, or one without [PAD] [UNK] [CLS] [SEP] [MASK].
        """
        folder = Path(folder)
        if (folder / MODEL_FILE).is_file():
            return cls(folder, _SentencePiece(folder / MODEL_FILE))
        if (folder / "tokenizer.json").is_file():
            return cls(folder, _HuggingFace(folder / "tokenizer.json"))
        raise ValueError(
            f"{folder} holds no tokenizer: neither {MODEL_FILE} nor tokenizer.json is there. A slow Hugging "
            "Face tokenizer (vocab.txt only) becomes a fast one by AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...)"
        )

    def encode(self, text: str, sentence_ends: list[int]) -> Encoded:
        """Tokenise a document and count the tokens of each sentence.

        sentence_ends: character offsets, exclusive, ascending, the last is len(text). A token belongs to
        the sentence that its first character other than space lies in; sentences without tokens vanish.
        The ids are those of the whole text, and what the exported tokenizer gives for it. (sentencepiece
        itself adds scores up in 32 bits: over a text of many thousand characters its own choice between
        near-equal segmentations is rounding noise. Here it sees a line, or a sentence, at a time.)
        Only between two orders of the same pieces, as I+II and II+I, the exported one may choose otherwise.
        """
        assert sentence_ends == [] or sentence_ends[-1] == len(text)
        tokens = self._model.encode(text, sentence_ends)
        lengths = np.bincount(tokens.sentences)
        return Encoded(tokens.ids, cut_sentence_lengths(lengths[lengths > 0]), tokens.word_starts)


def tokenizer_files(folder: Path) -> list[str]:
    """The names of those files in `folder` that belong to a tokenizer."""
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()]


@final
class _SentencePiece:
    """A sentencepiece model of ours, with tables over its pieces."""

    def __init__(self, path: Path) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = int(self.processor.get_piece_size())
        pieces = [self.processor.id_to_piece(i) for i in range(self.vocab_size)]
        found = {token: pieces.index(token) for token in SPECIAL_TOKENS if token in pieces}
        if found != {token: index for index, token in enumerate(SPECIAL_TOKENS)}:
            raise ValueError(
                f"{path} is no sentencepiece model of ours: {list(SPECIAL_TOKENS)} must have the ids 0 to 4, "
                f"found {found}. Use the folder of its fast Hugging Face form (tokenizer.json) instead"
            )
        self.special_ids = found
        is_byte = [self.processor.is_byte(i) for i in range(self.vocab_size)]
        byte = np.array(
            [int(p[3:5], 16) if b else -1 for p, b in zip(pieces, is_byte, strict=True)]
        )
        self._continues = (byte >= 0x80) & (byte < 0xC0)  # inside a character spelt in bytes
        self._num_characters = np.array(
            [1 if b else len(p) for p, b in zip(pieces, is_byte, strict=True)]
        )
        self._num_characters[self._continues] = 0
        self._marked = np.array([p.startswith(WORD_MARK) for p in pieces])
        # A Han character spelt in bytes begins with E4 to E9 (U+4000 to U+9FFF).
        self._han = np.array([is_han(p[0]) for p in pieces]) | ((byte >= 0xE4) & (byte <= 0xE9))
        self.kind: Kind = model_kind(read_model(path.read_bytes()))

    def encode(self, text: str, sentence_ends: list[int]) -> _Tokens:
        """Each run of sentences between spaces is encoded by itself."""
        ids: list[int] = []
        counts: list[int] = []  # tokens of each sentence, or of each run if it holds several
        several: list[
            tuple[slice, slice, int]
        ] = []  # such runs: tokens, characters, first sentence
        start, first = 0, 0
        for index, end in enumerate(sentence_ends):
            if end < len(text) and text[end - 1] not in SPACES and text[end] not in SPACES:
                continue  # no space here: a piece may reach across this end
            run = self.processor.encode(text[start:end])
            if index > first and run:
                several.append((slice(len(ids), len(ids) + len(run)), slice(start, end), first))
            ids += run
            counts += [0] * (index - first) + [len(run)]
            start, first = end, index + 1
        tokens = np.array(ids, dtype=np.uint32)
        sentences = np.repeat(np.arange(len(counts)), counts)
        for within, characters, first in several:
            ends = np.array(sentence_ends[first : int(sentences[within.start])]) - characters.start
            number = self._count_ends(text[characters], tokens[within], ends)
            sentences[within] = first + number
        return _Tokens(tokens, sentences, self._word_starts(tokens))

    def _count_ends(self, text: str, ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """int64 [n]: how many of `ends` lie at or before each token's first visible character."""
        normalised, origins = self.processor.normalize(text, with_offsets=True)
        widths = self._num_characters[ids]
        stops = np.cumsum(widths)
        assert stops[-1] == len(normalised)
        # A byte inside a character stands where the character does; a mark stands for a space before.
        starts = stops - np.maximum(widths, 1) + self._marked[ids]
        # `ends` as offsets in the normalised text: the first character that comes from beyond each
        bounds = np.searchsorted(np.array(origins), ends)
        return np.searchsorted(bounds, starts, side="right")

    def _word_starts(self, ids: np.ndarray) -> np.ndarray:
        """bool [n]: marked tokens, every Han token, and what follows one (a comma, a Latin name)."""
        han = self._han[ids]
        starts = self._marked[ids] | han
        starts[1:] |= han[:-1] & ~self._continues[ids[1:]]
        return starts


def is_han(character: str) -> bool:
    """Whether this is a Chinese ideograph (the blocks that BERT's own tokenizer takes as such)."""
    code = ord(character)
    return (
        0x4E00 <= code <= 0x9FFF
        or 0x3400 <= code <= 0x4DBF
        or 0xF900 <= code <= 0xFAFF
        or 0x20000 <= code <= 0x3134F
    )


@final
class _HuggingFace:
    """A fast Hugging Face tokenizer, as its tokenizer.json describes it."""

    kind: Kind = "hf"

    def __init__(self, path: Path) -> None:
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(
                f"{path} cannot be read by tokenizers {tokenizers.__version__}: {error}"
            ) from error
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(
                f"the tokenizer {path} lacks {missing}; it must hold all of {list(SPECIAL_TOKENS)}: add "
                "them with tokenizer.add_special_tokens, or train one (leave the tokenizer option out)"
            )
        self.vocab_size = max(vocabulary.values()) + 1
        self.special_ids = {token: vocabulary[token] for token in SPECIAL_TOKENS}
        self._reserved = np.array([i for t, i in self.special_ids.items() if t != "[UNK]"])
        texts = {index: token for token, index in vocabulary.items()}
        self._marked = np.array(
            [texts.get(i, "")[:1] in WORD_MARKS for i in range(self.vocab_size)]
        )
        self.tokenizer.encode_special_tokens = True  # "[MASK]" in a text is text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, text: str, sentence_ends: list[int]) -> _Tokens:
        """Words start where the tokenizer's own pre-tokenizer says so, and at every Han token."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.uint32)
        ids[np.isin(ids, self._reserved)] = self.special_ids["[UNK]"]
        starts = [_first_visible(text, start) for start, _ in encoding.offsets]
        han = np.array([start < len(text) and is_han(text[start]) for start in starts], dtype=bool)
        words = np.array([-1 if w is None else w for w in encoding.word_ids], dtype=np.int64)
        sentences = np.searchsorted(np.array(sentence_ends, dtype=np.int64), starts, side="right")
        word_starts = han | self._marked[ids] | (np.diff(words, prepend=-2) != 0)
        return _Tokens(ids, sentences, word_starts)


def _first_visible(text: str, start: int) -> int:
    """The first offset from `start` on that holds no space; len(text) if there is none."""
    while start < len(text) and text[start].isspace():
        start += 1
    return start
