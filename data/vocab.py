"""Text in, token ids out, with the sentence each token belongs to and whether it starts a word.

Ours is sentencepiece (unigram by default: 4 times the speed of BPE on English); any fast Hugging Face
tokenizer with the five special tokens may be used instead.
"""

from pathlib import Path
from typing import Literal, NamedTuple, final

import numpy as np

from data.encode_hf import HuggingFaceWords
from data.encode_sentencepiece import SentencePieceWords, is_han
from data.files import names_digest, read_small_json
from data.manifest import TOKENIZER_FILES
from data.shards import cut_sentence_lengths
from data.word_cache import WordCache, WordTokens, encode_slowly, flatten
from data.words import WordStarts, han_segmenter

__all__ = ["MODEL_FILE", "Encoded", "Tokenizer", "is_han", "tokenizer_files"]

MODEL_FILE = "sentencepiece.model"
Kind = Literal["unigram", "bpe", "wordpiece", "hf"]


class Encoded(NamedTuple):
    """A document in n tokens and k sentences."""

    ids: np.ndarray  # [n] uint32, never a special id other than [UNK]
    sentence_lengths: np.ndarray  # [k] uint16, each at least 1, sums to n
    word_starts: np.ndarray  # [n] bool


@final
class Tokenizer:
    """A tokenizer folder, loaded. `digest`: xxh3_128 over the names and bytes of its files, hex."""

    def __init__(self, folder: Path, model: SentencePieceWords | HuggingFaceWords) -> None:
        self.folder = folder
        self.kind: Kind = model.kind
        self.vocab_size = model.vocab_size
        self.special_ids = model.special_ids  # "[PAD]" -> id, all of SPECIAL_TOKENS
        self.digest = names_digest(folder, tokenizer_files(folder))
        self._model = model
        self._cache = WordCache(model)

    @classmethod
    def load(cls, folder: str | Path, word_starts: WordStarts = "pieces") -> "Tokenizer":
        """Open a folder of ours, or of a fast Hugging Face tokenizer.

        ValueError: no tokenizer there, or one without [PAD] [UNK] [CLS] [SEP] [MASK], or with code of its own;
        a segmenter is asked for that is not installed.
        """
        folder = Path(folder)
        refuse_own_code(folder / "tokenizer_config.json")
        segment = han_segmenter(word_starts)
        if (folder / MODEL_FILE).is_file():
            return cls(folder, SentencePieceWords(folder / MODEL_FILE, segment))
        if (folder / "tokenizer.json").is_file():
            return cls(folder, HuggingFaceWords(folder / "tokenizer.json", segment))
        raise ValueError(
            f"{folder} holds no tokenizer: neither {MODEL_FILE} nor tokenizer.json is there. A slow Hugging "
            "Face tokenizer (vocab.txt only) becomes a fast one by AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...)"
        )

    def piece_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """(characters, bytes) int64 [vocab_size] of the normalised text that each token spells."""
        return self._model.piece_sizes()

    def encode(self, text: str, sentence_ends: list[int]) -> Encoded:
        """Tokenise a document and count the tokens of each sentence; see `encode_batch`."""
        return self.encode_batch([text], [sentence_ends])[0]

    def encode_batch(self, texts: list[str], sentence_ends: list[list[int]]) -> list[Encoded]:
        """Tokenise documents and count the tokens of each sentence.

        sentence_ends: of each text the character offsets, exclusive, ascending; the last is len(text). A
        token belongs to the sentence that its first character other than space lies in; sentences without
        tokens vanish. The ids are what the exported tokenizer gives for the whole text.
        """
        return _cut(self._cache.encode(texts), texts, sentence_ends)

    def encode_batch_slowly(
        self, texts: list[str], sentence_ends: list[list[int]]
    ) -> list[Encoded]:
        """The slow twin of `encode_batch`: text by text, word by word."""
        return [
            _cut(encode_slowly(self._model, [text]), [text], [ends])[0]
            for text, ends in zip(texts, sentence_ends, strict=True)
        ]


def _cut(tokens: WordTokens, texts: list[str], sentence_ends: list[list[int]]) -> list[Encoded]:
    """The tokens of " ".join(texts), document by document, with the tokens of each sentence counted."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    begins = np.cumsum(lengths + 1) - lengths - 1
    num_ends, ends = flatten(sentence_ends)
    places = ends + np.repeat(begins, num_ends)
    before = np.searchsorted(tokens.offsets, places)  # tokens that begin before each sentence's end
    counts = np.diff(before, prepend=0)
    first_tokens = np.searchsorted(tokens.offsets, begins).tolist()
    last_ends = np.cumsum(num_ends).tolist()
    encoded, first_end = [], 0
    for start, stop, last_end in zip(
        first_tokens, [*first_tokens[1:], len(tokens.ids)], last_ends, strict=True
    ):
        of_sentences = counts[first_end:last_end]
        assert of_sentences.sum() == stop - start
        of_sentences = cut_sentence_lengths(of_sentences[of_sentences > 0])
        encoded.append(Encoded(tokens.ids[start:stop], of_sentences, tokens.starts[start:stop]))
        first_end = last_end
    return encoded


def refuse_own_code(path: Path) -> None:
    """ValueError where a tokenizer's configuration names Python classes that come with it."""
    content = read_small_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings of a tokenizer")
    if "auto_map" in content:
        raise ValueError(
            f"{path} has auto_map: this tokenizer is a program, which is never run. Give one that "
            "tokenizer.json describes wholly, and take auto_map out"
        )


def tokenizer_files(folder: Path) -> list[str]:
    """The names of those files in `folder` that belong to a tokenizer."""
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()]
