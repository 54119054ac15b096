"""A row, made slot by slot as a person would: the slow twin of `data.rows.make_rows`.

Only the addresses of hashes are shared with the fast way. Hashes are Python integers here.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from data.hashing import GOLDEN, MASK64, stable_hash64
from data.masking import GEOMETRIC, MAX_SPAN, NGRAM_SHARES, Masking, Vocabulary
from data.objectives import CAUSAL, TASKS, Recipe
from data.pairs import UNLABELLED
from data.rows import Row, RowPlan
from data.shards import Block


def mix(x: int) -> int:
    """The splitmix64 finaliser."""
    x &= MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def hash_at(key: int, position: int) -> int:
    return mix(key + (position + 1) * GOLDEN)


def share_of(bits: int) -> float:
    """64 bits as a number in [0, 1)."""
    return (bits >> 11) * 2.0**-53


@dataclass
class Slot:
    shown: int
    source: int | None  # the token of the block; None: [CLS] or [SEP]
    type: int = 0


@dataclass
class Sequence:
    slots: list[Slot]
    label: int = UNLABELLED
    parts: list[tuple[int, int]] = field(default_factory=list)  # (first slot, original place)
    noised_prefix: int = -1  # the last slot of noised text
    is_context: bool = False  # the next sequence continues it


class Maker:
    """Makes rows of one planned block."""

    def __init__(self, block: Block, plan: RowPlan, vocabulary: Vocabulary, key: int) -> None:
        self.block, self.plan, self.vocabulary, self.key = block, plan, vocabulary, key
        self.sentence_ends = [0, *np.cumsum(block.sentence_lengths, dtype=np.int64).tolist()]

    def text(self, start: int, stop: int, type_id: int = 0) -> list[Slot]:
        return [Slot(int(self.block.tokens[i]), i, type_id) for i in range(start, stop)]

    def cls(self) -> list[Slot]:
        return [Slot(self.vocabulary.cls_id, None)]

    def sep(self, type_id: int = 0) -> list[Slot]:
        return [Slot(self.vocabulary.sep_id, None, type_id)]

    def ends_within(self, start: int, stop: int) -> list[int]:
        return [end for end in self.sentence_ends if start <= end <= stop]

    def sequences(self, pair: int, recipe: Recipe) -> list[Sequence]:
        """A pair, laid out as its recipe wants."""
        pairs = self.plan.pairs
        a, b = int(pairs.a_start[pair]), int(pairs.b_start[pair])
        a_stop, b_stop = a + int(pairs.a_length[pair]), b + int(pairs.b_length[pair])
        label, is_swapped = int(pairs.label[pair]), bool(pairs.is_swapped[pair])
        if recipe.paired == "distance" and label != UNLABELLED:
            return self.halves((a, a_stop), (b, b_stop), label, is_swapped)
        if recipe.paired and is_swapped:
            first = self.ends_within(a, a_stop)[0]
            last = self.ends_within(b, b_stop)[-1]
            front = self.text(a, first) + self.text(b, last)
            back = self.text(first, a_stop, 1) + self.text(last, b_stop, 1)
            return [Sequence([*self.cls(), *front, *self.sep(), *back, *self.sep(1)], label)]
        if recipe.paired:
            slots = [*self.cls(), *self.text(a, a_stop), *self.sep()]
            if b < b_stop:
                slots += [*self.text(b, b_stop, 1), *self.sep(1)]
            return [Sequence(slots, label)]
        stop = max(a_stop, b_stop)  # nothing was exchanged: the text goes on from A to B
        if recipe.shuffled and len(self.ends_within(a, stop)) > 4:
            return [self.shuffled(a, stop)]
        if recipe.cpc and stop - a >= 8:
            return self.continued(a, stop)
        if recipe.tokens == "denoise" and stop - a >= 2:
            return [self.noised(a, stop)]
        return [Sequence([*self.cls(), *self.text(a, stop), *self.sep()])]

    def halves(
        self, a: tuple[int, int], b: tuple[int, int], label: int, is_swapped: bool
    ) -> list[Sequence]:
        ends = self.ends_within(*a)
        inner = ends[1:-1]
        middle = inner[mix(a[0] ^ stable_hash64(self.key, "halves")) % len(inner)]
        shown, other = (middle, a[1]), (ends[0], middle)
        if is_swapped:
            shown, other = other, shown
        first = [*self.cls(), *self.text(*shown), *self.sep(), *self.text(*b, 1)]
        second = [*self.cls(), *self.text(a[0], ends[0]), *self.text(*other)]
        return [Sequence(first, label), Sequence(second)]

    def continued(self, start: int, stop: int) -> list[Sequence]:
        bits = mix(start ^ stable_hash64(self.key, "continuation"))
        bounds = [start]
        for draw in (bits & 0xFFFFFFFF, bits >> 32):
            part = int((stop - start) * (0.25 + 0.25 * (draw * 2.0**-32)))
            bounds.append(bounds[-1] + part)
        bounds.append(stop)
        made = [
            Sequence([*self.cls(), *self.text(first, last)]) for first, last in pairwise(bounds)
        ]
        made[0].is_context = True
        return made

    def noised(self, start: int, stop: int) -> Sequence:
        """Half of the text; first with tokens deleted, hidden and moved by up to three places."""
        length = (stop - start) // 2
        if mix(start ^ stable_hash64(self.key, "half")) & 1:
            start += length
        left = []
        for place in range(length):
            bits = mix((start + place) * GOLDEN + stable_hash64(self.key, "noise"))
            draws = [share_of(mix(bits + number)) for number in range(3)]
            if place == 0 or draws[0] >= 0.1:
                (slot,) = self.text(start + place, start + place + 1)
                if draws[2] < 0.15:
                    slot.shown = self.vocabulary.mask_id
                left.append((place + 4 * draws[1], place, slot))
        left.sort(key=lambda item: item[:2])
        noised = [*self.cls(), *(slot for _, _, slot in left), *self.sep()]
        clean = [*self.text(start, start + length, 1), *self.sep(1)]
        return Sequence([*noised, *clean], noised_prefix=len(noised) - 1)

    def drawn_order(self, start: int, name: str) -> list[int]:
        key = stable_hash64(self.key, name)
        return sorted(range(4), key=lambda part: mix(mix(start * 4 + part) + key))

    def shuffled(self, start: int, stop: int) -> Sequence:
        ends = self.ends_within(start, stop)
        least, over = divmod(len(ends) - 1, 4)
        order = self.drawn_order(start, "parts")
        luck = self.drawn_order(start, "part lengths")
        parts, first = [], 0
        for place in range(4):
            size = least + (luck[place] < over)
            parts.append((ends[first], ends[first + size]))
            first += size
        slots = [*self.cls(), *self.text(start, ends[0])]
        places = []
        for place in order:
            places.append((len(slots), place))
            slots += self.text(*parts[place])
        slots += [*self.text(ends[-1], stop), *self.sep()]
        return Sequence(slots, parts=places)


def shown_instead(
    label: int, bits: int, masking: Masking, vocabulary: Vocabulary, token_bits: int
) -> int:
    action = share_of(mix(bits ^ 0x5851F42D4C957F2D))
    if action < masking.mask_share:
        return vocabulary.mask_id
    if action < masking.mask_share + masking.random_share:
        which = mix(mix(token_bits ^ 0x5851F42D4C957F2D)) % len(vocabulary.regular_ids)
        return int(vocabulary.regular_ids[which])
    return label


def words_of(slots: list[Slot], word_starts: np.ndarray) -> list[list[int]]:
    """The words of a row, as slots. A special token ends a word."""
    words: list[list[int]] = []
    for number, slot in enumerate(slots):
        if slot.source is None:
            continue
        goes_on = number > 0 and slots[number - 1].source is not None
        if goes_on and not word_starts[slot.source]:
            words[-1].append(number)
        else:
            words.append([number])
    return words


def run_length(kind: str, bits: int) -> int:
    """Words of the run that begins at a word."""
    if kind == "wwm":
        return 1
    draw = share_of(mix(bits ^ 0x2545F4914F6CDD1D))
    shares = [GEOMETRIC * (1 - GEOMETRIC) ** n for n in range(MAX_SPAN)]
    shares = list(NGRAM_SHARES) if kind == "ngram" else [s / sum(shares) for s in shares]
    for number, limit in enumerate(np.cumsum(shares)[:-1].tolist(), start=1):
        if draw < limit:
            return number
    return len(shares)


def words_to_hide(
    words: list[list[int]], kind: str, key: int, budget: int
) -> dict[int, tuple[int, list[int]]]:
    """Word number -> (hash of the run that hides it, its slots). Runs are drawn by hash, until the budget."""
    hashes = [hash_at(key, word[0]) for word in words]
    runs = []
    for number, bits in enumerate(hashes):
        run = [number]
        while (
            len(run) < run_length(kind, bits)
            and run[-1] + 1 < len(words)
            and words[run[-1] + 1][0] == words[run[-1]][-1] + 1
        ):
            run.append(run[-1] + 1)
        runs.append((bits, run))
    taken: dict[int, tuple[int, list[int]]] = {}
    num_hidden = 0
    for bits, run in sorted(runs, key=lambda item: (item[0] >> 24, item[1])):
        new = [number for number in run if number not in taken]
        size = sum(len(words[number]) for number in new)
        if not new:
            continue
        if taken and num_hidden + size / 2 > budget:
            break
        num_hidden += size
        taken |= {number: (bits, words[number]) for number in new}
    return taken


def hide(
    slots: list[Slot], recipe: Recipe, maker: Maker, masking: Masking, key: int
) -> dict[int, int]:
    """Hide tokens of a row, in place: slot -> the token that stood there."""
    text = [number for number, slot in enumerate(slots) if slot.source is not None]
    budget = max(1, round(masking.fraction * len(text)))
    kind, vocabulary, chosen = recipe.tokens, maker.vocabulary, {}  # slot -> its two hashes
    if kind in ("mlm", "rtd"):
        by_hash = sorted(text, key=lambda number: (hash_at(key, number) >> 24, number))
        chosen = {number: (hash_at(key, number),) * 2 for number in by_hash[:budget]}
        if kind == "rtd":
            masking = Masking(masking.fraction, 1.0, 0.0)
    elif kind in ("wwm", "span", "ngram"):
        words = words_of(slots, maker.plan.word_starts)
        for bits, word in words_to_hide(words, kind, key, budget).values():
            for number in word:
                own = hash_at(key, number)
                chosen[number] = (bits if kind == "span" else own, own)
    elif kind == "static_mlm":
        block = maker.block
        block_key = stable_hash64("static", int(block.document_ids[0]), len(block.tokens))
        for number in text:
            source = slots[number].source
            assert source is not None
            own = hash_at(block_key, source)
            if share_of(mix(own)) < masking.fraction:
                chosen[number] = (own, own)
    labels = {}
    for number in sorted(chosen):
        bits, token_bits = chosen[number]
        labels[number] = slots[number].shown
        slots[number].shown = shown_instead(labels[number], bits, masking, vocabulary, token_bits)
    return labels


def predict(
    sequence: Sequence, first: int, recipe: Recipe, key: int
) -> tuple[dict[int, int], list[int]]:
    """(slot of the row -> next token, what each slot sees) of one sequence that begins at slot `first`."""
    last = first + len(sequence.slots) - 1
    num_text = len(sequence.slots) - 2
    if recipe.tokens == "clm":
        prefix = 0
    elif recipe.tokens == "prefix_lm" and num_text > 1:
        prefix = 1 + mix(key ^ first ^ stable_hash64("prefix")) % (num_text - 1)
    elif recipe.tokens == "prefix_lm":
        prefix = 0
    else:
        prefix = sequence.noised_prefix
    if prefix < 0:
        return {}, [last] * len(sequence.slots)
    labels = {n: sequence.slots[n + 1 - first].shown for n in range(first + prefix, last)}
    return labels, [max(n, first + prefix) for n in range(first, last + 1)]


def move_runs(
    slots: list[Slot], share: float, labels: dict[int, int], key: int
) -> list[tuple[int, int]]:
    """Reorder tokens of some runs of three, in place: (slot, what stood there)."""
    stretches: list[list[int]] = []
    for number, slot in enumerate(slots):
        if slot.source is not None:
            if number and slots[number - 1].source is not None:
                stretches[-1].append(number)
            else:
                stretches.append([number])
    asked = []
    for stretch in stretches:
        for i in range(0, len(stretch) - 2, 3):
            run = stretch[i : i + 3]
            bits = hash_at(key ^ stable_hash64("word order"), run[0])
            if any(number in labels for number in run) or share_of(bits) >= share:
                continue
            stood = [slots[number].shown for number in run]
            moves = [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)][mix(bits) % 5]
            for number, move in zip(run, moves, strict=True):
                slots[number].shown = stood[move]
            asked += zip(run, stood, strict=True)
    return asked


def ask_of_tokens(slots: list[Slot], block: Block) -> list[tuple[str, int, int, int]]:
    """(task, slot, second slot, label): what really stands in each slot of text."""
    return [
        ("rtd", number, number, int(block.tokens[slot.source]))
        for number, slot in enumerate(slots)
        if slot.source is not None
    ]


def ask_of_sentences(sequences: list[Sequence], recipe: Recipe) -> list[tuple[str, int, int, int]]:
    """(task, slot, second slot, label)."""
    asked: list[tuple[str, int, int, int]] = []
    firsts = np.cumsum([0, *(len(sequence.slots) for sequence in sequences)]).tolist()
    of_sequences = list(zip(firsts, sequences, strict=False))
    if "reorder" in recipe.shuffled:
        for first, sequence in of_sequences:
            asked += [("reorder", first + n, first + n, place) for n, place in sequence.parts]
    if "relative" in recipe.shuffled:
        for first, sequence in of_sequences:
            for i, (one, place) in enumerate(sequence.parts):
                for two, other in sequence.parts[i + 1 :]:
                    label = (-3, -2, -1, 1, 2, 3).index(other - place)
                    asked.append(("relative", first + one, first + two, label))
    if recipe.contrastive:
        asked += [("contrastive", first, first, 0) for first, _ in of_sequences]
    asked += [
        ("cpc", first, first + len(sequence.slots), 0)
        for first, sequence in of_sequences
        if sequence.is_context
    ]
    return asked


def make_row(
    block: Block, plan: RowPlan, number: int, vocabulary: Vocabulary, masking: Masking, key: int
) -> Row:
    """Row `number` of a planned block."""
    recipe = plan.mixture.recipes[plan.recipes[number]]
    maker = Maker(block, plan, vocabulary, key)
    row_key = mix(number + stable_hash64(key, "mask"))
    sequences = [
        sequence
        for pair in plan.order[plan.starts[number] : plan.starts[number + 1]].tolist()
        for sequence in maker.sequences(pair, recipe)
    ]
    slots = [slot for sequence in sequences for slot in sequence.slots]
    labels, seen, first = hide(slots, recipe, maker, masking, row_key), [], 0
    for sequence in sequences:
        causal, sees = predict(sequence, first, recipe, row_key)
        labels |= causal
        seen += sees
        first += len(sequence.slots)
    moved: list[tuple[int, int]] = []
    if recipe.word_order:
        share = 0.05 if recipe.tokens else masking.fraction
        moved = move_runs(slots, share, labels, row_key)
    asked = [("word_order", slot, slot, label) for slot, label in moved]
    if recipe.tokens == "rtd":
        asked += ask_of_tokens(slots, block)
    asked += ask_of_sentences(sequences, recipe)
    is_causal = any(other.tokens in CAUSAL for other in plan.mixture.recipes)
    sizes = [len(sequence.slots) for sequence in sequences]
    return Row(
        np.array([slot.shown for slot in slots], dtype=np.uint32),
        np.array([slot.type for slot in slots], dtype=np.uint8),
        np.array(sizes, dtype=np.int64),
        np.array(sorted(labels), dtype=np.int64),
        np.array([labels[slot] for slot in sorted(labels)], dtype=np.uint32),
        np.array([sequence.label for sequence in sequences], dtype=np.int64),
        np.array([place for size in sizes for place in range(size)], dtype=np.int32),
        np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        np.array([pair[1:3] for pair in asked], dtype=np.int64).reshape(-1, 2),
        np.array([label for *_, label in asked], dtype=np.uint32),
        np.array([TASKS.index(task) for task, *_ in asked], dtype=np.uint8),
        np.array(seen if is_causal else [], dtype=np.int32),
        np.array([recipe.key], dtype=np.uint64),
    )
