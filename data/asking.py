"""Assembled rows and their recipes in, what is hidden of them and what is asked out.

Every loss of a run finds its labels here: `hide` for those that ask for tokens in the place of others or for
next tokens, one such task a row; `ask` for all else. What is asked of a whole pair: `data.pairs`.
"""

from typing import NamedTuple

import numpy as np

from data.assembly import Slots
from data.corruption import WORD_ORDER_SHARE, move_tokens, next_tokens
from data.hashing import mix64, stable_hash64
from data.masking import Masking, Text, Vocabulary, mask_always, mask_rows, mask_spans
from data.objectives import CAUSAL, NUM_PARTS, TASKS, Recipe
from data.sequences import Spans, is_labelled, relative_classes, relative_label
from data.shards import Block


class Asking(NamedTuple):
    """What decides the labels of some rows."""

    block: Block
    recipes: tuple[Recipe, ...]
    row_recipes: np.ndarray  # int64 [num_rows], into recipes
    masking: Masking
    vocabulary: Vocabulary

    @property
    def recipe_keys(self) -> np.ndarray:
        """uint64 [num_rows]."""
        return np.array([recipe.key for recipe in self.recipes], dtype=np.uint64)[self.row_recipes]

    def rows_with(self, has: list[bool]) -> np.ndarray:
        """bool [num_rows]: rows of the recipes for which `has` says so."""
        return np.array(has)[self.row_recipes]

    def rows_hidden_by(self, name: str) -> np.ndarray | None:
        """bool [num_rows]; None where no recipe hides text so."""
        has = [recipe.tokens == name for recipe in self.recipes]
        return self.rows_with(has) if any(has) else None


class Hidden(NamedTuple):
    slots: np.ndarray  # int64, ascending
    labels: np.ndarray  # uint32: the token that stood there; of causal rows the next one


class Asked(NamedTuple):
    slots: np.ndarray  # int64 [e, 2], ascending by row: one slot twice, or two
    labels: np.ndarray  # uint32 [e]
    tasks: np.ndarray  # uint8 [e], into TASKS


def hide(
    asking: Asking, slots: Slots, spans: Spans, text: Text, word_starts: np.ndarray
) -> tuple[Hidden, np.ndarray]:
    """Hide tokens of the rows, in place. Also what each slot sees, int32 [num_slots], if any row is causal.

    word_starts: bool, of the block's tokens, for those that hide whole words.
    """
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    ids, masking, vocabulary = slots.ids, asking.masking, asking.vocabulary
    for name in ("mlm", "rtd"):
        if (rows := asking.rows_hidden_by(name)) is not None:
            # a generator's input has nothing but [MASK] (Clark et al. 2020, 3.1)
            how = masking if name == "mlm" else Masking(masking.fraction, 1.0, 0.0)
            parts.append(mask_rows(ids, text.of_rows(rows), how, vocabulary))
    for name in ("wwm", "span", "ngram"):
        if (rows := asking.rows_hidden_by(name)) is not None:
            own = text.of_rows(rows)
            starts = word_starts[slots.source[_rows_of_text(text, rows)]]
            parts.append(mask_spans(ids, own, starts, name, masking, vocabulary))
    if (rows := asking.rows_hidden_by("static_mlm")) is not None:
        chosen = _rows_of_text(text, rows)
        block_key = stable_hash64(
            "static", int(asking.block.document_ids[0]), len(asking.block.tokens)
        )
        parts.append(
            mask_always(
                ids, text.slots[chosen], slots.source[chosen], block_key, masking, vocabulary
            )
        )
    seen = np.empty(0, dtype=np.int32)
    if any(recipe.tokens in CAUSAL for recipe in asking.recipes):
        lengths = np.diff(np.append(slots.sequence_starts, len(ids)))
        causal = next_tokens(
            ids, slots.sequence_starts, lengths, _prefixes(asking, slots, spans, text)
        )
        parts.append((causal.slots, causal.labels))
        row_starts = np.repeat(text.row_starts[:-1], np.diff(text.row_starts))
        seen = (causal.seen - row_starts).astype(np.int32)
    if len(parts) == 1:
        return Hidden(*parts[0]), seen
    found = np.concatenate([part[0] for part in parts] or [np.empty(0, dtype=np.int64)])
    labels = np.concatenate([part[1] for part in parts] or [np.empty(0, dtype=np.uint32)])
    order = np.argsort(found)
    return Hidden(found[order], labels[order]), seen


def _rows_of_text(text: Text, rows: np.ndarray) -> np.ndarray:
    """bool, for each of text.slots: whether its row is chosen."""
    return np.repeat(rows, np.diff(np.searchsorted(text.slots, text.row_starts)))


def _prefixes(asking: Asking, slots: Slots, spans: Spans, text: Text) -> np.ndarray:
    """int64 [number of sequences]: the last slot of each sequence's prefix; -1 where rows are not causal."""
    starts = slots.sequence_starts
    row = np.searchsorted(text.row_starts, starts, side="right") - 1
    num_text = np.diff(np.append(starts, len(slots.ids))) - 2
    prefixes = np.full(len(starts), -1, dtype=np.int64)
    if (rows := asking.rows_hidden_by("clm")) is not None:
        prefixes[rows[row]] = 0
    if (rows := asking.rows_hidden_by("prefix_lm")) is not None:
        in_row = (starts - text.row_starts[row]).astype(np.uint64)
        draw = mix64(text.keys[row] ^ in_row ^ np.uint64(stable_hash64("prefix")))
        drawn = 1 + (draw % np.maximum(num_text - 1, 1).astype(np.uint64)).astype(np.int64)
        prefixes = np.where(rows[row], np.where(num_text > 1, drawn, 0), prefixes)
    if (rows := asking.rows_hidden_by("denoise")) is not None:
        noised = rows[row] & spans.noised[slots.sequence_pair]
        prefixes[noised] = slots.first_sizes[slots.sequence_pair[noised]] - 1
    return prefixes


def ask(asking: Asking, slots: Slots, spans: Spans, text: Text, hidden: Hidden) -> Asked:
    """What is asked besides; word_order moves tokens of the rows, in place."""
    parts: list[
        tuple[str, np.ndarray, np.ndarray, np.ndarray]
    ] = []  # task, slot, second slot, label
    recipes, row_recipes = asking.recipes, asking.row_recipes
    if any(recipe.word_order for recipe in recipes):
        share = np.array([_share_of_runs(recipe, asking.masking.fraction) for recipe in recipes])
        is_free = np.ones(len(slots.ids), dtype=bool)
        is_free[hidden.slots] = False
        moved, labels = move_tokens(slots.ids, text, share[row_recipes], is_free[text.slots])
        parts.append(("word_order", moved, moved, labels))
    if (rows := asking.rows_hidden_by("rtd")) is not None:
        chosen = _rows_of_text(text, rows)
        own = text.slots[chosen]
        parts.append(("rtd", own, own, asking.block.tokens[slots.source[chosen]]))
    parts += _ask_of_sentences(asking, slots, spans)
    if not parts:
        return Asked(np.empty((0, 2), np.int64), np.empty(0, np.uint32), np.empty(0, np.uint8))
    pairs = np.concatenate([np.stack([first, second], axis=1) for _, first, second, _ in parts])
    labels = np.concatenate([label.astype(np.uint32) for *_, label in parts])
    codes = [np.full(len(first), TASKS.index(task), np.uint8) for task, first, _, _ in parts]
    row = np.searchsorted(text.row_starts, pairs[:, 0], side="right")
    order = np.argsort(row, kind="stable")
    return Asked(pairs[order], labels[order], np.concatenate(codes)[order])


def _share_of_runs(recipe: Recipe, fraction: float) -> float:
    if not recipe.word_order:
        return 0.0
    return WORD_ORDER_SHARE if recipe.tokens else fraction


def _ask_of_sentences(
    asking: Asking, slots: Slots, spans: Spans
) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    parts = []
    row = np.searchsorted(slots.row_starts, slots.sequence_starts, side="right") - 1
    recipes = asking.recipes
    if any(recipe.shuffled for recipe in recipes):
        first, second = relative_classes()
        of_sequence = asking.row_recipes[row]
        for task in ("reorder", "relative"):
            has = np.array([task in recipe.shuffled for recipe in recipes])[of_sequence]
            pair = slots.sequence_pair[has]
            pair = pair[is_labelled(spans)[pair]]
            places = spans.parts[pair]
            starts = slots.span_starts[pair, 1 : NUM_PARTS + 1]
            if task == "reorder":
                parts.append((task, starts.ravel(), starts.ravel(), places.ravel()))
            else:
                label = relative_label(places[:, first], places[:, second])
                parts.append(
                    (task, starts[:, first].ravel(), starts[:, second].ravel(), label.ravel())
                )
    if any(recipe.contrastive for recipe in recipes):
        own = slots.sequence_starts[asking.rows_with([r.contrastive for r in recipes])[row]]
        parts.append(("contrastive", own, own, np.zeros(len(own), np.uint32)))
    if any(recipe.cpc for recipe in recipes):
        is_cpc = asking.rows_with([recipe.cpc for recipe in recipes])[row]
        is_first = np.diff(slots.sequence_pair, prepend=-1) > 0
        contexts = np.flatnonzero(is_cpc & is_first & ~np.append(is_first[1:], True))
        context, target = slots.sequence_starts[contexts], slots.sequence_starts[contexts + 1]
        parts.append(("cpc", context, target, np.zeros(len(contexts), np.uint32)))
    return parts
