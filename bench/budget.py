"""A training step in, where its time goes out: products, attention, elementwise work, head, optimizer."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("mm", "addmm", "linear", "addmm_", "matmul")
ATTENTION = (
    "bmm",
    "baddbmm",
    "_softmax",
    "_softmax_backward_data",
    "_flash_attn",
    "varlen",
    "scaled_dot_product",
)
OPTIMIZER = ("_fused_adamw_", "linalg_vector_norm", "_foreach_norm", "clip_grad")
DROPOUT = ("random_", "native_dropout", "bernoulli_", "ge")
COPIES = ("copy_", "cat", "fill_", "zero_", "index_select", "index", "embedding_dense_backward")
HEAD = "LinearCrossEntropy"


def time_budget(step: Callable[[], Any], repetitions: int = 3) -> dict[str, float]:
    """Share of the time of each kind of work, on this process's CPU, in steps that are warm. Sums to 1."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repetitions):
            step()
    spent: Counter[str] = Counter()
    for event in profiler.events() or ():
        spent[kind_of(event)] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: seconds / total for kind, seconds in spent.most_common()}


def kind_of(event: Any) -> str:
    parent = event
    while parent is not None:
        if parent.name.startswith(HEAD):
            return "head: products and cross-entropy"
        parent = parent.cpu_parent
    name = event.name.removeprefix("aten::")
    for kind, names in (
        ("products of the encoder", PRODUCTS),
        ("optimizer", OPTIMIZER),
        ("random numbers of dropout", DROPOUT),
        ("copies and look-ups", COPIES),
    ):
        if name in names:
            return kind
    if name.startswith(ATTENTION):
        return "attention"
    return "other elementwise work"
