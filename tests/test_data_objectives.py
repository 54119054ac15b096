"""What a user may rely on of every objective: rates, whole words, labels that tell the truth, nothing lost."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from objectives_support import (
    CLS,
    FIRST,
    MASK,
    SEP,
    Made,
    asked,
    clean_ids,
    make,
    rows_of,
    segments,
    unique_block,
)
from test_data_rows import RECIPES, random_documents

from data.hashing import hash_positions
from data.masking import Masking, _run_lengths
from data.objectives import CAUSAL, DEFAULT_RECIPE, read_mixture, read_recipe
from data.rows import Row

HIDING = ("mlm", "wwm", "span", "ngram", "static_mlm", "rtd")


def text_slots(made: Made, number: int) -> np.ndarray:
    """bool, for each slot of a row: whether it is text. Not of causal rows."""
    ids = clean_ids(made.rows[number])
    return (ids != CLS) & (ids != SEP)


@pytest.mark.parametrize(
    "masking", [Masking(0.15), Masking(0.3, 0.5, 0.25), Masking(0.15, 1.0, 0.0)]
)
@pytest.mark.parametrize("name", HIDING)
def test_rates(name: str, masking: Masking) -> None:
    made = make(name, length=512, num_documents=300, masking=masking)
    hidden, shown, labels = [], [], []
    for number, row in enumerate(made.rows):
        num_text = text_slots(made, number).sum()
        hidden.append(len(row.masked_positions) / num_text)
        shown.append(row.input_ids[row.masked_positions])
        labels.append(row.masked_labels)
    # of a row: to the token, or to half a word or run; static_mlm draws each token
    nearest = {"mlm": 1, "rtd": 1, "wwm": 2, "ngram": 8, "span": 20, "static_mlm": 60}[name]
    longest = [n for n, row in enumerate(made.rows) if len(row.input_ids) > 400]
    assert all(abs(hidden[n] - masking.fraction) * 400 < nearest for n in longest)
    assert np.mean(hidden) == pytest.approx(masking.fraction, abs=0.01)
    now, then = np.concatenate(shown), np.concatenate(labels)
    mask_share, random_share = (1.0, 0.0) if name == "rtd" else masking[1:]
    assert (now == MASK).mean() == pytest.approx(mask_share, abs=0.02)
    kept = (now == then).mean()
    assert kept == pytest.approx(1 - mask_share - random_share, abs=0.02)
    others = now[(now != MASK) & (now != then)]
    assert len(others) == 0 or (others.min() >= FIRST and len(np.unique(others)) > len(others) / 2)


@pytest.mark.parametrize("word_mean", [1, 2, 4])
@pytest.mark.parametrize("name", ["wwm+nsp", "span+sop", "ngram+reorder"])
def test_words_are_hidden_whole(name: str, word_mean: int) -> None:
    """Words of 1, of 1 to 3 (as pieces of English), of 1 to 7 tokens (as characters of Chinese words)."""
    made = make(name, word_mean=word_mean)
    starts = made.plan.word_starts
    num_words = 0
    for number, row in enumerate(made.rows):
        ids, is_text = clean_ids(row), text_slots(made, number)
        is_hidden = np.zeros(len(ids), dtype=bool)
        is_hidden[row.masked_positions] = True
        for slot in np.flatnonzero(is_text[1:] & is_text[:-1]) + 1:
            if not starts[ids[slot] - FIRST]:
                assert is_hidden[slot] == is_hidden[slot - 1]
                num_words += is_hidden[slot]
    assert num_words > 100 or word_mean == 1


def test_lengths_of_runs() -> None:
    """Spans: 0.2 x 0.8^(n - 1), up to 10 words; n-grams: 40, 30, 20 and 10 %; words: one."""
    hashes = hash_positions(3, 200_000)
    shares = np.array([0.2 * 0.8 ** (n - 1) for n in range(1, 11)])
    for kind, wanted in (
        ("span", shares / shares.sum()), ("ngram", [0.4, 0.3, 0.2, 0.1]), ("wwm", [1.0]),
    ):  # fmt: skip
        lengths = _run_lengths(hashes, kind)
        found = np.bincount(lengths, minlength=len(wanted) + 1)[1:] / len(hashes)
        assert found == pytest.approx(wanted, abs=0.005)


@pytest.mark.parametrize(("name", "least", "most"), [
    ("wwm", 1.0, 1.3), ("ngram", 1.8, 2.5), ("span", 3.2, 4.8),
])  # fmt: skip
def test_runs_in_rows(name: str, least: float, most: float) -> None:
    """How many hidden words stand side by side, where words are single tokens."""
    runs = []
    for row in make(name, length=512, num_documents=200, word_mean=1).rows:
        breaks = np.flatnonzero(np.diff(row.masked_positions) != 1)
        runs += np.diff([-1, *breaks, len(row.masked_positions) - 1]).tolist()
    assert least <= np.mean(runs) <= most


def test_a_span_shows_one_kind_of_thing() -> None:
    """A whole span is shown as [MASK], as other tokens, or as it is (Joshi et al. 2020)."""
    kinds: Counter[int] = Counter()
    for row in make("span", length=512, num_documents=200, masking=Masking(0.02), word_mean=1).rows:
        shown = row.input_ids[row.masked_positions]
        kind = np.where(shown == MASK, 0, np.where(shown == row.masked_labels, 1, 2))
        breaks = np.flatnonzero(np.diff(row.masked_positions) != 1) + 1
        kinds.update(len(set(run.tolist())) for run in np.split(kind, breaks) if len(run) > 2)
    assert kinds[1] > 0.9 * kinds.total() > 50  # spans side by side are few


def test_static_masks_are_the_same_in_every_epoch_and_dynamic_ones_are_not() -> None:
    block = unique_block(random_documents(0))
    for name, is_same in (("static_mlm", True), ("mlm", False)):
        shown = []
        for key in (1, 2):
            made = rows_of(block, name, key=key)
            of_token = {}
            for row in made.rows:
                labels = row.masked_labels.tolist()
                of_token |= dict(
                    zip(labels, row.input_ids[row.masked_positions].tolist(), strict=True)
                )
            shown.append(of_token)
        assert len(shown[0]) > 1000 and (shown[0] == shown[1]) == is_same


def test_word_order_moves_runs_of_three_and_nothing_that_is_hidden() -> None:
    for name, share in (("word_order", 0.15), ("mlm+word_order", None)):
        moved = total = 0
        for row in make(name).rows:
            slots, labels = asked(row, "word_order")
            slots = slots[:, 0].reshape(-1, 3)
            assert (np.diff(slots, axis=1) == 1).all()
            assert not np.isin(slots, row.masked_positions).any()
            now, then = row.input_ids[slots], labels.reshape(-1, 3)
            assert (np.sort(now, axis=1) == np.sort(then, axis=1)).all() and (now != then).any(
                axis=1
            ).all()
            moved += slots.size
            total += len(row.input_ids)
        if share:
            assert moved / total == pytest.approx(share, abs=0.02)
        else:  # 5 % of the runs that have no hidden token
            assert moved / total == pytest.approx(0.05 * 0.85**3, abs=0.01)


@pytest.mark.parametrize(("name", "shares"), [
    ("nsp", (1 / 2, 1 / 2)), ("sop", (1 / 2, 1 / 2)), ("order", (1 / 3,) * 3), ("distance", (1 / 3,) * 3),
])  # fmt: skip
def test_classes_of_pairs_tell_the_truth_and_are_balanced(name: str, shares: tuple) -> None:
    labels: Counter[int] = Counter()
    num_pairs = 0
    for seed in range(3):
        made = make(name, seed, num_documents=400)
        documents, begins = made.documents, made.begins_sentence
        num_pairs += len(made.plan.order)
        for number in range(len(made.rows)):
            for label, first, second in segments(made, number):
                labels[label] += 1
                same_document = documents[first[-1]] == documents[second[0]]
                if name == "nsp":
                    assert (second[0] == first[-1] + 1) == (label == 0)
                    assert same_document == (label == 0)
                    continue
                if name == "distance":
                    assert (second[0] == first[-1] + 1) == (label == 0)
                    assert same_document == (label < 2)
                    assert label != 1 or second[0] > first[-1] + 1
                    continue
                assert same_document == (label != 2)
                if label == 1:  # whole sentences of B, then those of A, within the two outer ends
                    jump = (
                        int(np.flatnonzero(np.diff(first) != 1)[0]) + 1
                        if (np.diff(first) != 1).any()
                        else 0
                    )
                    assert second[0] < first[jump] and begins[first[jump]] and begins[second[0]]
                    everything = np.sort(np.concatenate([first, second]))
                    assert (np.diff(everything) == 1).all()
                elif label == 0:
                    assert (np.diff(np.concatenate([first, second])) == 1).all()
                assert begins[first[-1] + 1] and begins[second[0]]
    found = [labels[kind] / labels.total() for kind in range(len(shares))]
    assert found == pytest.approx(shares, abs=0.03)
    assert labels.total() / num_pairs > 0.3


def test_shuffled_parts_tell_the_truth_and_all_orders_are_as_frequent() -> None:
    orders: Counter[tuple[int, ...]] = Counter()
    distances: Counter[int] = Counter()
    for seed in range(3):
        for row in make("reorder+relative", seed, num_documents=400).rows:
            ids = clean_ids(row)
            slots, places = asked(row, "reorder")
            for four, place in zip(slots[:, 0].reshape(-1, 4), places.reshape(-1, 4), strict=True):
                orders[tuple(place.tolist())] += 1
                assert np.argsort(np.argsort(ids[four])).tolist() == place.tolist()
            of_slot = dict(zip(slots[:, 0].tolist(), places.tolist(), strict=True))
            for (one, two), label in zip(*asked(row, "relative"), strict=True):
                distance = int(of_slot[two]) - int(of_slot[one])
                assert (-3, -2, -1, 1, 2, 3)[label] == distance and one < two
                distances[distance] += 1
    assert set(orders) == set(permutations(range(4)))
    mean = orders.total() / 24
    assert mean > 60 and all(abs(n - mean) < 4.5 * mean**0.5 for n in orders.values())
    assert [distances[d] / distances.total() for d in (1, 2, 3)] == pytest.approx(
        [1 / 4, 1 / 6, 1 / 12], abs=0.02
    )


def test_a_continuation_follows_its_context_and_does_not_see_it() -> None:
    made = make("mlm+cpc", num_documents=200)
    num_contexts = 0
    for row in made.rows:
        ids = clean_ids(row)
        stops = np.cumsum(row.sequence_lengths)
        for context, continuation in asked(row, "cpc")[0].tolist():
            assert ids[context] == ids[continuation] == CLS
            assert ids[continuation - 1] + 1 == ids[continuation + 1]
            assert row.sequence_ids[continuation] == row.sequence_ids[context] + 1
            assert continuation in stops
            num_contexts += 1
    assert num_contexts > 0.9 * len(made.plan.order)
    for row in make("contrastive").rows:
        slots, _ = asked(row, "contrastive")
        assert (
            slots[:, 0].tolist()
            == (np.cumsum(row.sequence_lengths) - row.sequence_lengths).tolist()
        )


def test_rtd_asks_for_every_token_that_really_stands_there() -> None:
    made = make("rtd+sop")
    for number, row in enumerate(made.rows):
        slots, labels = asked(row, "rtd")
        ids = clean_ids(row)
        assert slots[:, 0].tolist() == np.flatnonzero(text_slots(made, number)).tolist()
        assert (ids[slots[:, 0]] == labels).all()


@pytest.mark.parametrize("name", CAUSAL)
def test_what_is_asked_is_never_seen(name: str) -> None:
    made = make({name: 2, "mlm+nsp": 1}, num_documents=200)
    prefixes = []
    for number, row in enumerate(made.rows):
        stops = np.cumsum(row.sequence_lengths)
        starts = stops - row.sequence_lengths
        of_slot = np.repeat(np.arange(len(stops)), row.sequence_lengths)
        slots = np.arange(len(row.input_ids))
        assert (row.seen >= slots).all() and (row.seen < stops[of_slot]).all()
        if made.recipe(number).tokens != name:
            assert (row.seen == stops[of_slot] - 1).all()
            continue
        assert (row.input_ids[row.masked_positions + 1] == row.masked_labels).all()
        # whoever asks, and whatever it sees, sees none of what is asked from there on
        assert (row.seen[row.masked_positions] == row.masked_positions).all()
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            own = row.masked_positions[
                (row.masked_positions >= start) & (row.masked_positions < stop)
            ]
            if len(own):
                prefix = int(own[0])
                assert own.tolist() == list(range(prefix, stop - 1))
                assert (row.seen[start : prefix + 1] == prefix).all()
                if stop - start > 12:
                    prefixes.append((prefix - start - 1) / (stop - start - 4))
            else:
                assert name == "denoise" and stop - start <= 3
    if name == "prefix_lm":
        counts = np.histogram(prefixes, 5, (0, 1.0001))[0]
        assert counts.min() > 0.7 * counts.mean() > 50
    elif name == "clm":
        assert max(prefixes) < 0


def test_noise_deletes_hides_and_moves() -> None:
    deleted, hidden, moves, num_tokens = 0, 0, [], 0
    for row in make("denoise", num_documents=200).rows:
        stops = np.cumsum(row.sequence_lengths)
        for start, stop in zip(stops - row.sequence_lengths, stops, strict=True):
            ids, types = row.input_ids[start:stop].astype(np.int64), row.token_type_ids[start:stop]
            clean = ids[types == 1][:-1]
            noised = ids[types == 0][1:-1]
            if len(clean) < 8:
                continue
            num_tokens += len(clean)
            deleted += len(clean) - len(noised)
            hidden += (noised == MASK).sum()
            places = noised[noised != MASK] - clean[0]
            assert (np.diff(clean) == 1).all() and set(places) <= set(range(len(clean)))
            moves += (np.argsort(np.argsort(places)) - np.arange(len(places))).tolist()
    assert deleted / num_tokens == pytest.approx(0.1, abs=0.02)
    assert hidden / (num_tokens - deleted) == pytest.approx(0.15, abs=0.02)
    assert max(np.abs(moves)) <= 3 and 0.4 < np.mean(np.array(moves) != 0) < 0.9


@pytest.mark.parametrize("length", [16, 128, 512])
@pytest.mark.parametrize("objectives", [
    *({name: 1} for name in RECIPES), dict.fromkeys(RECIPES, 1), {"wwm+sop": 5, "mlm+order": 3, "clm": 1},
], ids=lambda mixture: " ".join(mixture)[:30])  # fmt: skip
def test_every_token_is_in_exactly_one_row(objectives: dict, length: int) -> None:
    """Of rows of denoise, half of each pair."""
    made = make(objectives, length=length, num_documents=100)
    seen: Counter[int] = Counter()
    left_out = 0
    for number, row in enumerate(made.rows):
        assert len(row.input_ids) == row.sequence_lengths.sum() <= length
        if made.recipe(number).tokens == "denoise":
            pairs = made.plan.order[made.plan.starts[number] : made.plan.starts[number + 1]]
            tokens = made.plan.pairs.a_length[pairs] + made.plan.pairs.b_length[pairs]
            left_out += int((tokens - np.maximum(tokens // 2, tokens == 1)).sum())
            ids = row.input_ids[(row.token_type_ids == 1) | np.isin(row.sequence_ids, _short(row))]
        elif made.recipe(number).tokens in CAUSAL:
            ids = row.input_ids
        else:
            ids = clean_ids(row)
        seen.update((ids[ids >= FIRST] - FIRST).tolist())
    assert set(seen.values()) == {1}
    assert len(seen) == len(made.block.tokens) - left_out


def _short(row: Row) -> np.ndarray:
    """Sequences of one token, which have no noised copy."""
    return np.flatnonzero(row.sequence_lengths == 3)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "denoise"])
def test_rows_are_full(name: str) -> None:
    """At most 2 % of the slots are padding in a block of the usual size."""
    rng = np.random.default_rng(1)
    documents = [
        np.maximum(2, rng.lognormal(3, 0.6, max(1, int(rng.lognormal(2.8, 1)))))
        .astype(int)
        .tolist()
        for _ in range(430)
    ]
    made = rows_of(unique_block(documents), name, 512)
    assert sum(len(row.input_ids) for row in made.rows) / (len(made.rows) * 512) >= 0.98


def test_shares_of_rows_are_the_weights_in_every_period() -> None:
    mixture = read_mixture({"wwm+sop": 5, "clm": 2, "mlm": 0, "rtd": 1})
    recipes = mixture.of_rows(7, 8 * 50)
    for period in recipes.reshape(50, 8):
        assert np.bincount(period, minlength=4).tolist() == [5, 2, 0, 1]
    assert len({tuple(period) for period in recipes.reshape(50, 8).tolist()}) > 20
    assert (mixture.of_rows(8, 400) != recipes).any()
    made = make({"wwm+sop": 5, "clm": 2, "rtd": 1}, num_documents=100)
    counts = np.bincount([made.plan.recipes[n] for n in range(len(made.rows) // 8 * 8)])
    assert (counts * 8 == np.array([5, 2, 1]) * counts.sum()).all()
    assert {row.recipe[0] for row in made.rows} == {
        recipe.key for recipe in made.plan.mixture.recipes
    }


def test_names_that_contradict_are_refused_all_at_once() -> None:
    with pytest.raises(ValueError) as refused:
        read_mixture({
            "mlm+nps": 1, "mlm+wwm": 1, "clm+nsp": 1, "nsp+sop": 1, "word_order+rtd": 1, "mlm+mlm": 1,
            "reorder+cpc": 1, "nsp+mlm": 2, "mlm+nsp": 3, "span": 2000,
        })  # fmt: skip
    for problem in (
        "'nps' is none of mlm, wwm,", "mlm and wwm cannot both hide", "[CLS] does not see the text: nsp",
        "nsp and sop lay a row out differently", "not with rtd", "an objective is named twice",
        "reorder and cpc lay a row out", "names mlm+nsp twice", "span is 2000: give an integer",
    ):  # fmt: skip
        assert problem in str(refused.value)
    for bad in ({}, {"mlm": 0}, {"": 1}, {"mlm+": 1}):
        with pytest.raises(ValueError, match=r"data\.objectives"):
            read_mixture(bad)


def test_a_recipe_is_the_same_in_any_order_of_its_names() -> None:
    assert read_recipe("sop+wwm") == read_recipe("wwm+sop")
    keys = [read_recipe(name).key for name in RECIPES]
    assert len(set(keys)) == len(keys) and read_recipe(DEFAULT_RECIPE).key == 0
