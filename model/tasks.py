"""The name of a task in, what it is of the model out: its head, its classes, its index. No torch.

A task is one loss. What its rows are like is the data's concern; this is what the network does:

    mlm           the token that stood at a masked slot (Devlin et al. 2019, 3.1): -log p(token | masked row)
    wwm           the same, whole words masked (Devlin et al., in their code; Cui et al. 2021)
    span          the same, spans masked (Joshi et al. 2020), without their loss of the span's boundary
    ngram         the same, n-grams masked (ERNIE, Sun et al. 2019; MacBERT, Cui et al. 2020)
    static_mlm    the same, a row masked alike for ever, as in Devlin's data: to compare with
    clm           the next token: -log p(token | those before), each slot seeing no later one (Radford et al.
                  2018). The encoder is the same, `visible` makes it causal
    prefix_lm     the same after a prefix that sees itself whole (UniLM, Dong et al. 2019)
    denoise       a text restored from its damaged copy (BART, Lewis et al. 2020). The copy is a prefix here, in
                  one network, where theirs has an encoder and a decoder
    word_order    the tokens of shuffled trigrams, at their places (StructBERT, Wang et al. 2020)
    rtd_generator the token that stood at a masked slot, by a small generator (ELECTRA, Clark et al. 2020)
    rtd           was a token replaced by the generator's sample: binary cross-entropy at every text slot (the
                  same, section 3). Its weight beside the generator's loss, 50 there, is the trainer's
    nsp           does B follow A, or come from elsewhere (Devlin et al. 2019, 3.1)
    sop           are A and B in order, or swapped (ALBERT, Lan et al. 2020)
    order         is B next, previous, or from elsewhere (StructBERT, Wang et al. 2020)
    distance      are A and B neighbours, of one document, of two (ERNIE 2.0, Sun et al. 2020)
    reorder       where a shuffled part of a document stood, told at its first slot (SLM, Lee et al. 2020; a
                  classifier of places here, where theirs points)
    relative      how far, and on which side, one shuffled part stood of another: -3, -2, -1, 1, 2, 3. Ours
    contrastive   which is the same sequence, encoded with other dropout (SimCSE, Gao et al. 2021):
                  -log softmax_j(cos(z_i, z'_j) / 0.05) at j = i, among the sequences of a micro-batch, where
                  theirs are those of all ranks
    cpc           which sequence follows in the document (van den Oord et al. 2018): -log softmax_j(c_i W t_j)
                  at j = i, among those of a micro-batch; one step ahead, without a network over contexts
"""

from typing import NamedTuple

REORDER_PARTS = 4  # of a shuffled document
OF_VOCABULARY = 0  # classes: the tokens
OF_BATCH = -1  # classes: the other sequences of the micro-batch
TEMPERATURE = 0.05  # of the contrastive loss


class Task(NamedTuple):
    head: str  # name of the model's module
    num_classes: int  # or OF_VOCABULARY, OF_BATCH
    index_width: int = 1  # slots that one label is of
    is_causal: bool = False  # its rows come with `visible`


def _vocabulary(*, is_causal: bool = False) -> Task:
    return Task("mlm_head", OF_VOCABULARY, is_causal=is_causal)


TASKS: dict[str, Task] = {  # in the order of their heads in the model
    "mlm": _vocabulary(),
    "wwm": _vocabulary(),
    "span": _vocabulary(),
    "ngram": _vocabulary(),
    "static_mlm": _vocabulary(),
    "clm": _vocabulary(is_causal=True),
    "prefix_lm": _vocabulary(is_causal=True),
    "denoise": _vocabulary(is_causal=True),
    "word_order": _vocabulary(),
    "rtd_generator": Task("generator", OF_VOCABULARY),
    "rtd": Task("rtd_head", OF_VOCABULARY),  # its labels are tokens, its classes are two
    "nsp": Task("nsp_head", 2),
    "sop": Task("sop_head", 2),
    "order": Task("order_head", 3),
    "distance": Task("distance_head", 3),
    "reorder": Task("reorder_head", REORDER_PARTS),
    "relative": Task("relative_head", 2 * (REORDER_PARTS - 1), index_width=2),
    "contrastive": Task("contrastive_head", OF_BATCH),
    "cpc": Task("cpc_head", OF_BATCH, index_width=2),
}
DEFAULT_TASKS = ("mlm", "nsp")
OF_REPLACED_TOKENS = ("rtd_generator", "rtd")  # neither is there without the other


def heads_of(tasks: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the modules that these tasks need, each once, in the order of the model."""
    return tuple(dict.fromkeys(task.head for name, task in TASKS.items() if name in tasks))


def label_limit(task: str, vocab_size: int) -> int:
    """Labels of a task are below this."""
    classes = TASKS[task].num_classes
    return {OF_VOCABULARY: vocab_size, OF_BATCH: 1}.get(classes, classes)


def task_problems(tasks: tuple[str, ...]) -> list[str]:
    """Why a model cannot have these tasks."""
    if not tasks:
        return ["tasks is empty: there is nothing to learn"]
    problems = [
        f"task {task!r} is not one of {', '.join(TASKS)}" for task in tasks if task not in TASKS
    ]
    problems += [f"task {task!r} is there twice" for task in set(tasks) if tasks.count(task) > 1]
    given = [task for task in OF_REPLACED_TOKENS if task in tasks]
    if len(given) == 1:
        problems.append(
            f"task {given[0]!r} is alone: {' and '.join(OF_REPLACED_TOKENS)} need each other"
        )
    return problems
