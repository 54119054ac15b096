"""Where ZeRO has put each weight matrix in, what an optimizer needs that looks at whole matrices out.

ZeRO hands an optimizer one flat tensor for each parameter group, or part of one, of which every rank owns a
slice: a rank sees a third of a matrix here, the tail of another there. A `Layout` says which.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

EMA = "ema"  # the average's name among an optimizer's state


class Matrix(NamedTuple):
    """`rows * columns` elements of a flattened parameter: all of it, or one of several stacked in it."""

    name: str
    offset: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns


class Piece(NamedTuple):
    """A contiguous part of a parameter in a tensor that this rank's optimizer owns."""

    name: str
    owned: int  # which of the owned tensors
    start: int  # in it, flattened
    offset: int  # in the parameter, flattened
    length: int


class Fragment(NamedTuple):
    """A contiguous part of a matrix in an owned tensor."""

    matrix: int
    start: int  # in the owned tensor, flattened
    offset: int  # in the matrix, flattened
    length: int

    def of(self, owned: torch.Tensor) -> torch.Tensor:
        return owned.view(-1).narrow(0, self.start, self.length)


class Layout(NamedTuple):
    """All matrices, and who holds what of them. One rank only where each holds everything (ZeRO 0)."""

    matrices: list[Matrix]
    owned: dict[torch.Tensor, int]  # this rank's tensors; equally many on every rank
    fragments: list[list[list[Fragment]]]  # of each rank, in each of its owned tensors
    rank: int
    device: torch.device  # where the ranks exchange

    @property
    def is_partitioned(self) -> bool:
        return len(self.fragments) > 1

    def mine(self, owned: torch.Tensor) -> list[Fragment]:
        return self.fragments[self.rank][self.owned[owned]]


def find_matrices(shapes: Mapping[str, torch.Size], stacked: Mapping[str, int]) -> list[Matrix]:
    """Every matrix among parameters of these shapes.

    stacked: of parameters whose names end so, how many matrices lie over one another in each: a fused
        projection of queries, keys and values is three matrices to an optimizer, as where they are apart.
    """
    found = []
    for name, shape in shapes.items():
        if len(shape) != 2:
            continue
        number = next((n for ending, n in stacked.items() if name.endswith(ending)), 1)
        rows, columns = shape[0] // number, shape[1]
        found += [Matrix(name, i * rows * columns, rows, columns) for i in range(number)]
    return found


def find_layout(
    matrices: list[Matrix],
    owned: list[torch.Tensor],
    pieces: Iterable[Piece],
    *,
    is_partitioned: bool,
    device: torch.device,
) -> Layout:
    """Cut this rank's pieces at the borders of matrices, and learn of those of the others. Collective."""
    by_name: dict[str, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_name.setdefault(matrix.name, []).append(index)
    mine: list[list[Fragment]] = [[] for _ in owned]
    for piece in pieces:
        for index in by_name.get(piece.name, ()):
            matrix = matrices[index]
            begin = max(piece.offset, matrix.offset)
            end = min(piece.offset + piece.length, matrix.offset + matrix.numel)
            if begin < end:
                start = piece.start + begin - piece.offset
                fragment = Fragment(index, start, begin - matrix.offset, end - begin)
                mine[piece.owned].append(fragment)
    indices = {tensor: index for index, tensor in enumerate(owned)}
    if not is_partitioned or dist.get_world_size() == 1:
        return Layout(matrices, indices, [mine], 0, device)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return Layout(matrices, indices, everyone, dist.get_rank(), device)


class Item(NamedTuple):
    """An owned tensor in a step: flat, or a whole parameter at ZeRO 0."""

    group: dict[str, Any]
    owned: torch.Tensor
    gradient: torch.Tensor
    state: dict[str, torch.Tensor]


class PartitionedOptimizer(torch.optim.Optimizer):
    """An optimizer of matrices that need be seen whole, and AdamW of everything else.

    Each group's "rule" tells which. DeepSpeed steps group after group, at ZeRO 3 parts of groups, on all
    ranks in the same order: a step is collective. The gradients that it sees are clipped.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self.layout: Layout | None = None  # known only when DeepSpeed has made its partitions

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.layout is None:  # DeepSpeed's trial of zero gradients
            return
        items = [
            Item(group, owned, owned.grad, self.state[owned])
            for group in self.param_groups
            for owned in group["params"]
            if owned.grad is not None
        ]
        _step_adamw([item for item in items if item.group["rule"] == "adamw"])
        if own := [item for item in items if item.group["rule"] != "adamw"]:
            for item in own:
                item.state["step"] += 1
            self.update(own, self.layout)

    @abstractmethod
    def update(self, items: list[Item], layout: Layout) -> None:
        """Change the tensors of these items and their state. Collective."""


def _step_adamw(items: list[Item]) -> None:
    """By torch's fused kernel, as in its own AdamW."""
    for item in items:
        group, state = item.group, item.state
        adamw(
            [item.owned],
            [item.gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )


def average_weights(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Keep an exponential moving average of what `optimizer` steps, in its state, after each of its steps.

    a = decay a + (1 - decay) w. A rank averages the fp32 slice that it owns.
    """

    @torch.no_grad()
    def average(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for owned in group["params"]:
                if owned.grad is not None and EMA in optimizer.state.get(owned, {}):
                    optimizer.state[owned][EMA].lerp_(owned, 1 - decay)

    optimizer.register_step_post_hook(average)
