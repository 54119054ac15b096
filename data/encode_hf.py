"""Words in, a fast Hugging Face tokenizer's tokens out, each with its place and whether a word starts there."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, final

import numpy as np
import tokenizers

from data.encode_sentencepiece import SegmentStarts, is_han
from data.tokenizer_hf import SPECIAL_TOKENS
from data.word_cache import WordTokens

WORD_MARKS = ("\u2581", "\u0120")  # of sentencepiece, and of byte-level BPE
SPACE = re.compile("([ \n\t\r])")
SPACE_OR_HAN = re.compile(  # BERT's normaliser parts text at all of these, and at some more
    "([ \n\t\r\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f])"
)


@final
class HuggingFaceWords:
    """A fast Hugging Face tokenizer, as its tokenizer.json describes it.

    With BERT's own normaliser and pre-tokenizer a word is what lies between spaces (and Han characters).
    Of other tokenizers nothing is known: the whole text is their word.
    """

    gap = 1

    def __init__(self, path: Path, segment: SegmentStarts | None = None) -> None:
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
        self.kind: Literal["wordpiece", "hf"] = "wordpiece" if _is_bert(path) else "hf"
        self.gap = 0 if self.kind == "wordpiece" else 1
        self._segment = segment
        self._reserved = np.array([i for t, i in self.special_ids.items() if t != "[UNK]"])
        texts = {index: token for token, index in vocabulary.items()}
        self._marked = np.array(
            [texts.get(i, "")[:1] in WORD_MARKS for i in range(self.vocab_size)]
        )
        self.tokenizer.encode_special_tokens = True  # "[MASK]" in a text is text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def piece_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """(characters, bytes) int64 [vocab_size]; without the marks of words, and of what goes on in one."""
        pieces = [""] * self.vocab_size
        for piece, index in self.tokenizer.get_vocab(with_added_tokens=True).items():
            if piece not in self.special_ids:
                pieces[index] = piece.removeprefix("##").lstrip("".join(WORD_MARKS))
        characters = np.array([len(piece) for piece in pieces])
        return characters, np.array([len(piece.encode("utf-8")) for piece in pieces])

    def spaced(self, texts: Sequence[str]) -> None:
        return None

    def words(self, texts: Sequence[str]) -> list[str]:
        if self.kind != "wordpiece":
            return list(texts)
        # A segmenter must see Han characters together.
        return (SPACE if self._segment else SPACE_OR_HAN).split(" ".join(texts))

    def encode_words(self, words: list[str]) -> WordTokens:
        """Words of BERT's are encoded together, parted by spaces; others one by one."""
        if self.kind == "wordpiece":
            return self._encode(words)
        parts = [self._encode([word]) for word in words]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return WordTokens(*columns)

    def _encode(self, words: list[str]) -> WordTokens:
        """Words start where the tokenizer's own pre-tokenizer says so, and at every Han token."""
        text = " ".join(words)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.uint32)
        ids[np.isin(ids, self._reserved)] = self.special_ids["[UNK]"]
        firsts = np.array([_first_visible(text, start) for start, _ in encoding.offsets], np.int64)
        han = np.array([start < len(text) and is_han(text[start]) for start in firsts], np.bool_)
        numbers = np.array([-1 if w is None else w for w in encoding.word_ids], np.int64)
        starts = self._marked[ids] | (np.diff(numbers, prepend=-2) != 0)
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        begins = np.cumsum(lengths + 1) - lengths - 1
        owners = np.searchsorted(begins, firsts, side="right") - 1
        counts = np.bincount(owners, minlength=len(words))
        if self._segment is None:
            starts |= han
        else:
            places = (np.cumsum(lengths) - lengths)[owners] + firsts - begins[owners]
            inside = np.append(self._segment(words), False)
            starts = np.where(han, inside[np.minimum(places, len(inside) - 1)], starts)
        return WordTokens(counts, ids, firsts - begins[owners], starts)


def _is_bert(path: Path) -> bool:
    """Whether words are independent of each other: WordPiece behind BERT's normaliser and pre-tokenizer."""
    description = json.loads(path.read_bytes())
    parts = {
        name: (description.get(name) or {}).get("type")
        for name in ("model", "normalizer", "pre_tokenizer")
    }
    wanted = {
        "model": "WordPiece",
        "normalizer": "BertNormalizer",
        "pre_tokenizer": "BertPreTokenizer",
    }
    han = (description.get("normalizer") or {}).get("handle_chinese_chars")
    added = [token["content"] for token in description.get("added_tokens", [])]
    return parts == wanted and han is True and set(added) <= set(SPECIAL_TOKENS)


def _first_visible(text: str, start: int) -> int:
    """The first offset from `start` on that holds no space; len(text) if there is none."""
    while start < len(text) and text[start].isspace():
        start += 1
    return start
