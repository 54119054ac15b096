"""Chinese text in, where its words start out: by a segmenter, if one is asked for.

Where words start is stored with the tokens, so that whole words can be masked without a segmenter in the
trainer. "pieces": a token is a word if the tokenizer's pre-tokenizer says so, and every token of Han
characters is one. "rjieba": a token of Han characters starts a word if a word of jieba's segmentation
starts at its first character. English is the same in both.
"""

import importlib
from itertools import accumulate
from typing import Literal

import numpy as np

from data.encode_sentencepiece import SegmentStarts

WordStarts = Literal["pieces", "rjieba"]
WORD_STARTS: tuple[WordStarts, WordStarts] = ("pieces", "rjieba")


def han_segmenter(kind: WordStarts) -> SegmentStarts | None:
    """What tells the starts of words of `kind`; None where the pieces do.

    ValueError: rjieba is asked for and not installed.
    """
    if kind == "pieces":
        return None
    try:
        importlib.import_module("rjieba")
    except ImportError as error:
        raise ValueError(
            "word_starts rjieba needs the package rjieba, which is not installed: pip install 'cloze[zh]', "
            "or take word_starts pieces"
        ) from error
    return segment_starts


def segment_starts(texts: list[str]) -> np.ndarray:
    """bool [characters of all texts, back to back]: whether a word of jieba starts at each.

    Every text is segmented by itself: jieba never joins what a space parts.
    """
    import rjieba

    joined = " ".join(texts)
    starts = np.zeros(len(joined) + 1, np.bool_)
    starts[list(accumulate(map(len, rjieba.cut(joined)), initial=0))] = True
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    inside = np.ones(len(joined), np.bool_)
    inside[(np.cumsum(lengths + 1) - 1)[:-1]] = False
    return starts[:-1][inside]
