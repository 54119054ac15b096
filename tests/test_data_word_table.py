"""The word table: every word finds its own row, and only its own."""

import numpy as np

from data.word_table import MAX_KEY_BYTES, WordTable, find_spans, keys_of


def test_words_find_their_rows_among_neighbours():
    """Half full, so that many words begin at the same slot; and short ones are beginnings of longer ones."""
    words = [f"{'ab' * (n % 7)}{n}"[:MAX_KEY_BYTES] for n in range(120)] + [
        "",
        "\0",
        "\0\0",
        "龘",
        "é",
    ]
    spans = find_spans(" ".join(words))
    assert spans.words(np.arange(len(words))) == words
    table = WordTable(8)
    first, second = np.arange(60), np.arange(60, len(words))
    keys = keys_of(spans)
    table.add(keys.take(first), first)
    assert table.find(keys).tolist() == [*range(60), *[-1] * len(second)]
    table.add(keys.take(second), second)
    assert table.find(keys).tolist() == list(range(len(words)))


def test_places_count_characters():
    text = "a 今天 𠮷é  x"
    spans = find_spans(text)
    assert spans.places.tolist() == [0, 2, 5, 8, 9]
    assert spans.words(np.arange(5)) == text.split(" ")
