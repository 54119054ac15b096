"""Names of objectives in, what every row of a run is made for out.

A *recipe* names what a row is made for: how its text is hidden, and what is asked of its sentences, joined
by "+", e.g. "mlm+nsp", "wwm+sop", "clm", "span+reorder+relative". A *mixture* gives each recipe an integer
weight. A *task* is one loss; a recipe has one or more. Rows of all recipes are made from the same shards.

What hides text (Recipe.tokens), at most one:

    mlm          tokens (Devlin et al. 2019), other ones in every epoch (Liu et al. 2019)
    wwm          whole words (Devlin et al., code of 2019; Cui et al. 2019 for Chinese)
    span         spans of words of geometric length (Joshi et al. 2020)
    ngram        runs of 1 to 4 words (ERNIE's phrases, Sun et al. 2019, as drawn by Cui et al. 2020)
    static_mlm   tokens, the same ones in every epoch (Devlin et al.'s own data), to compare with
    rtd          tokens, and which of a generator's replacements are wrong is asked (Clark et al. 2020)
    clm          none: every token is predicted from those before it (Radford et al. 2018)
    prefix_lm    none: what follows a prefix is predicted, token by token (Dong et al. 2019)
    denoise      the text once with words deleted, hidden and moved, then predicted (Lewis et al. 2020)

    word_order   moves tokens within some runs of three and asks for the right ones (Wang et al. 2020);
                 alone, or besides one of mlm, wwm, span, ngram, static_mlm

What is asked of sentences:

    nsp          does B follow A, or is it of another document? (Devlin et al. 2019)
    sop          does B follow A, or A follow B? (Lan et al. 2020)
    order        is B next, previous, or of another document? (Wang et al. 2020)
    distance     does B follow, come later in the document, or from another? (Sun et al. 2020)
    reorder      which place did each of four shuffled parts have? (Lee et al. 2020)
    relative     how far, and in which direction, were two of four shuffled parts apart?
    contrastive  are two views of a sequence under dropout each other's nearest? (Gao et al. 2021)
    cpc          which continuation belongs to a text? (van den Oord et al. 2018)
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.hashing import hash_positions, stable_hash64

MASKED = ("mlm", "wwm", "span", "ngram", "static_mlm")  # hide tokens and ask for them
CAUSAL = ("clm", "prefix_lm", "denoise")  # not every token is seen by every other
PAIRED = ("nsp", "sop", "order", "distance")  # classes of a pair (A, B)
SHUFFLED = ("reorder", "relative")
TOKEN_OBJECTIVES = (*MASKED, "rtd", *CAUSAL, "word_order")
SENTENCE_OBJECTIVES = (*PAIRED, *SHUFFLED, "contrastive", "cpc")
# Every loss there is, in the order in which a model has their heads.
TASKS = (
    *MASKED, *CAUSAL, "word_order", "rtd_generator", "rtd", *PAIRED, *SHUFFLED, "contrastive", "cpc",
)  # fmt: skip
DEFAULT_RECIPE = "mlm+nsp"
NUM_PARTS = 4  # that reorder and relative shuffle
MAX_RECIPES, MAX_WEIGHT = 64, 1024


class Recipe(NamedTuple):
    """What a row is made for."""

    name: str
    tokens: str | None  # how text is hidden: of TOKEN_OBJECTIVES, but for word_order
    word_order: bool
    paired: str | None  # of PAIRED
    shuffled: tuple[str, ...]  # of SHUFFLED
    contrastive: bool
    cpc: bool

    @property
    def masked_task(self) -> str | None:
        """The task that the row's masked labels are of."""
        return "rtd_generator" if self.tokens == "rtd" else self.tokens

    @property
    def tasks(self) -> tuple[str, ...]:
        """All losses of such a row, in the order of TASKS."""
        own = {
            *self.name.split("+"),
            *(["rtd_generator"] if self.tokens == "rtd" else []),
        }
        return tuple(task for task in TASKS if task in own)

    @property
    def key(self) -> int:
        """64 bits that rows of the recipe carry; 0 for the default, whose rows are older than recipes."""
        return 0 if self.name == DEFAULT_RECIPE else stable_hash64("recipe", self.name)


@lru_cache(maxsize=256)
def read_recipe(name: str) -> Recipe:
    """The recipe of a name. ValueError, with all that is wrong."""
    parts = name.split("+")
    known = (*TOKEN_OBJECTIVES, *SENTENCE_OBJECTIVES)
    problems = [
        f"{part!r} is none of {', '.join(known)}"
        for part in dict.fromkeys(parts)
        if part not in known
    ]
    if len(set(parts)) < len(parts):
        problems.append("an objective is named twice")
    hiding = [part for part in parts if part in TOKEN_OBJECTIVES and part != "word_order"]
    paired = [part for part in parts if part in PAIRED]
    shuffled = tuple(part for part in SHUFFLED if part in parts)
    asks = [part for part in parts if part in SENTENCE_OBJECTIVES]
    if len(hiding) > 1:
        problems.append(f"{' and '.join(hiding)} cannot both hide a row's text")
    if "word_order" in parts and hiding and hiding[0] not in MASKED:
        problems.append(f"word_order goes with {', '.join(MASKED)}, or alone, not with {hiding[0]}")
    if hiding and hiding[0] in CAUSAL and asks:
        problems.append(
            f"in rows of {hiding[0]} [CLS] does not see the text: {asks[0]} cannot be asked"
        )
    layouts = [
        *paired,
        *(["+".join(shuffled)] if shuffled else []),
        *(["cpc"] if "cpc" in parts else []),
    ]
    if len(layouts) > 1:
        problems.append(f"{' and '.join(layouts)} lay a row out differently")
    if problems:
        raise ValueError(f"objective {name!r}: " + "; ".join(problems))
    # the same objectives in another order are the same recipe
    ordered = "+".join(part for part in (*TOKEN_OBJECTIVES, *SENTENCE_OBJECTIVES) if part in parts)
    return Recipe(
        ordered,
        hiding[0] if hiding else None,
        "word_order" in parts,
        paired[0] if paired else None,
        shuffled,
        "contrastive" in parts,
        "cpc" in parts,
    )


@dataclass(frozen=True)
class Mixture:
    """Recipes and their integer weights: the share of rows that each has.

    A recipe of weight 0 has no rows, now; its tasks are there, for another phase of the run has some.
    """

    recipes: tuple[Recipe, ...]
    weights: tuple[int, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """All losses, in the order of TASKS."""
        found = {task for recipe in self.recipes for task in recipe.tasks}
        return tuple(task for task in TASKS if task in found)

    @property
    def is_causal(self) -> bool:
        """Whether there are rows in which not every token sees every other."""
        return any(recipe.tokens in CAUSAL for recipe in self.recipes)

    def of_rows(self, key: int, num_rows: int) -> np.ndarray:
        """int64 [num_rows]: which recipe each row of a reading of a block has.

        Every run of sum(weights) rows has each recipe `weight` times, in an order drawn from `key`.
        """
        in_use = np.flatnonzero(self.weights)
        if len(in_use) == 1:
            return np.full(num_rows, in_use[0])
        period = sum(self.weights)
        cycles = -(-num_rows // period)
        hashes = hash_positions(stable_hash64(key, "recipes"), cycles * period)
        slots = np.argsort(hashes.reshape(cycles, period), axis=1, kind="stable")
        return np.repeat(np.arange(len(self.weights)), self.weights)[slots].ravel()[:num_rows]


def read_mixture(objectives: dict[str, int]) -> Mixture:
    """A mixture from `data.objectives` of a preset. ValueError, with all that is wrong."""
    problems, recipes = [], {}
    if not 1 <= len(objectives) <= MAX_RECIPES:
        problems.append(f"data.objectives has {len(objectives)} entries: give 1 to {MAX_RECIPES}")
    for name, weight in objectives.items():
        try:
            recipe = read_recipe(name)
        except ValueError as error:
            problems.append(f"data.objectives: {error}")
            continue
        if recipe.name in recipes:
            problems.append(f"data.objectives names {recipe.name} twice")
        if not 0 <= weight <= MAX_WEIGHT:
            problems.append(
                f"data.objectives.{name} is {weight}: give an integer in 0 to {MAX_WEIGHT}"
            )
        recipes[recipe.name] = recipe
    if not problems and not any(objectives.values()):
        problems.append(f"data.objectives {objectives} gives no recipe any rows")
    if problems:
        raise ValueError("; ".join(problems))
    return Mixture(tuple(recipes.values()), tuple(objectives.values()))


DEFAULT_MIXTURE = read_mixture({DEFAULT_RECIPE: 1})
