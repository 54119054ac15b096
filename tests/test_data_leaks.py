"""What is asked of sentences can be told by nothing but the text: no length, no cut, no place."""

import numpy as np
import pytest
from objectives_support import CLS, FIRST, SEP, asked, clean_ids, make, segments

NUM_BLOCKS = 8


def assert_tells_nothing(feature: np.ndarray, label: np.ndarray, what: str) -> None:
    """Each class is as frequent among the labels with any value of the feature, to four standard errors."""
    for kind in np.unique(label):
        share = (label == kind).mean()
        for value in np.unique(feature):
            own = label[feature == value] == kind
            error = np.sqrt(share * (1 - share) / len(own))
            assert abs(own.mean() - share) < 4 * error + 1 / len(own), (what, int(kind), value)


def in_bins(values: np.ndarray, num_bins: int) -> np.ndarray:
    """The quantile that each value lies in."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, num_bins + 1)[1:-1]))
    return np.searchsorted(edges, values, side="right")


@pytest.mark.parametrize(("objectives", "length"), [
    ({"nsp": 1, "mlm": 3}, 128), ({"sop": 1}, 128), ({"order": 1}, 128), ({"distance": 1}, 128),
    ({"sop": 1, "order": 2, "distance": 2, "mlm": 1}, 512),
], ids=str)  # fmt: skip
def test_neither_lengths_nor_cuts_tell_the_class_of_a_pair(objectives: dict, length: int) -> None:
    features: dict[str, list] = {}
    for seed in range(NUM_BLOCKS):
        made = make(objectives, seed, length=length, num_documents=400 * length // 128)
        begins = made.begins_sentence
        for number in range(len(made.rows)):
            name = made.recipe(number).paired
            for label, first, second in segments(made, number):
                features.setdefault(name or "", []).append((
                    label, len(first), len(second), len(first) + len(second),
                    begins[first[0]], begins[first[-1] + 1],
                    begins[second[0]], begins[second[-1] + 1],
                ))  # fmt: skip
    assert set(features) == set(objectives) - {"mlm"}
    for name, rows in features.items():
        label, first, second, both, *edges = np.array(rows).T
        assert len(label) > 1000
        for what, lengths in (("first", first), ("second", second), ("both", both)):
            assert_tells_nothing(in_bins(lengths, 10), label, f"{name}: {what}")
        joint = in_bins(first, 6) * 10 + in_bins(both, 6)
        assert_tells_nothing(joint, label, f"{name}: first and both")
        full = both >= np.quantile(both, 0.9) - length // 128
        assert_tells_nothing(in_bins(first[full], 24), label[full], f"{name}: full rows")
        for place, edge in enumerate(edges):
            assert_tells_nothing(edge, label, f"{name}: edge {place}")


@pytest.mark.parametrize("length", [128, 256])
def test_lengths_do_not_tell_a_parts_place(length: int) -> None:
    sizes, places, pair_sizes, distances = [], [], [], []
    for seed in range(NUM_BLOCKS):
        made = make("reorder+relative", seed, length=length, num_documents=400 * length // 128)
        num_sentences = np.cumsum(made.begins_sentence)
        for row in made.rows:
            slots, found = asked(row, "reorder")
            ids = clean_ids(row)
            for four, place in zip(slots[:, 0].reshape(-1, 4), found.reshape(-1, 4), strict=True):
                starts = ids[four] - FIRST
                inner = np.sort(starts)
                stops = np.append(inner[1:], _core_end(ids, four, made.begins_sentence))
                length_of = dict(zip(inner.tolist(), (stops - inner).tolist(), strict=True))
                count_of = {
                    a: num_sentences[b] - num_sentences[a]
                    for a, b in zip(inner.tolist(), stops.tolist(), strict=True)
                }
                sizes += [(length_of[s], count_of[s]) for s in starts.tolist()]
                places += place.tolist()
                for i in range(4):
                    for j in range(i + 1, 4):
                        pair_sizes.append(int(count_of[starts[i]] - count_of[starts[j]]))
                        distances.append(int(place[j]) - int(place[i]))
    size, place = np.array(sizes), np.array(places)
    assert len(place) > 2000
    assert_tells_nothing(in_bins(size[:, 0], 10), place, "tokens of a part")
    assert_tells_nothing(size[:, 1].clip(0, 12), place, "sentences of a part")
    assert_tells_nothing(np.array(pair_sizes), np.array(distances), "sentences of two parts")


def _core_end(ids: np.ndarray, four: np.ndarray, begins: np.ndarray) -> int:
    """Where the part that stood last ends: at the last sentence end of the sequence."""
    stop = int(four[0])
    while ids[stop] != SEP:
        stop += 1
    start = int(four[0])
    while ids[start] != CLS:
        start -= 1
    tokens = ids[start + 1 : stop] - FIRST
    ends = [token + 1 for token in tokens.tolist() if begins[token + 1]]
    return max(ends)


def test_lengths_are_no_match_of_context_and_continuation() -> None:
    """Of pairs that fill a row: nothing of the continuation's length follows from the context's."""
    contexts, continuations = [], []
    for seed in range(NUM_BLOCKS):
        for row in make("cpc", seed, num_documents=400).rows:
            lengths = row.sequence_lengths
            if len(lengths) == 3 and lengths.sum() == 128:
                contexts.append(lengths[0])
                continuations.append(lengths[1])
    assert len(contexts) > 1000
    of_context, of_continuation = np.array(contexts), np.array(continuations)
    assert abs(np.corrcoef(of_context, of_continuation)[0, 1]) < 0.1
    assert_tells_nothing(in_bins(of_context, 4), in_bins(of_continuation, 4), "lengths of cpc")
