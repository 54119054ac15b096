"""Muon (Jordan et al. 2024) on ZeRO's partitions.

    b = momentum b + g
    o = NewtonSchulz(g + momentum b)                              Nesterov; 5 steps; about U V^T
    w = (1 - lr weight_decay) w - lr 0.2 sqrt(max(rows, columns)) o

The factor (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2) gives updates the root mean
square of AdamW's, so both take the same learning rate and decay. Only the layers' matrices are updated so;
embeddings, heads and vectors by AdamW. Matrices that are stacked in one weight are orthogonalised one by one.

Momentum is elementwise, and stays in ZeRO's slices. Then each matrix is gathered on one rank, which
orthogonalises it and gives every other its slice back: in rounds of one matrix for each rank, so that all
work at once and none holds more than one whole matrix.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from trainer.partitions import Fragment, Item, Layout, Matrix, PartitionedOptimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steep at 0: singular values end between 0.7 and 1.2
NUM_STEPS = 5
EPS = 1e-7


class Round(NamedTuple):
    """One matrix for each rank to work on, at the same time; this rank's part of it."""

    matrix: Matrix | None  # to work on
    theirs: list[Fragment | None]  # of it, by rank
    mine: list[Fragment | None]  # of the matrix of each rank


class Muon(PartitionedOptimizer):
    """Rule "muon" of the layers' matrices.

    dtype: of Newton-Schulz, and of what the ranks exchange; bf16, as its authors have it, where the model
        computes in bf16
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype) -> None:
        super().__init__(groups)
        self.dtype = dtype
        # of each owned tensor, planned when it is first stepped
        self._rounds: dict[int, list[Round]] = {}

    def update(self, items: list[Item], layout: Layout) -> None:
        for item in items:
            learning_rate, momentum = item.group["lr"], item.group["momentum"]
            buffer = item.state["momentum_buffer"]
            buffer.mul_(momentum).add_(item.gradient)
            direction = item.gradient.add(buffer, alpha=momentum)
            item.owned.mul_(1 - learning_rate * item.group["weight_decay"])
            for fragment, value in self._orthogonalise(item.owned, direction, layout):
                _, _, rows, columns = layout.matrices[fragment.matrix]
                scale = 0.2 * math.sqrt(max(rows, columns))
                fragment.of(item.owned).add_(value.to(item.owned), alpha=-learning_rate * scale)

    def _orthogonalise(
        self, owned: torch.Tensor, direction: torch.Tensor, layout: Layout
    ) -> Iterator[tuple[Fragment, torch.Tensor]]:
        """This rank's fragments of every matrix in `direction`, orthogonalised. Collective."""
        index = layout.owned[owned]
        if index not in self._rounds:
            self._rounds[index] = plan_rounds(layout, index)
        nothing = torch.empty(0, dtype=self.dtype, device=layout.device)
        for work in self._rounds[index]:
            parts = [f.of(direction).to(layout.device, self.dtype) for f in work.mine if f]
            parts = _exchange(parts, work.mine, work.theirs, nothing)
            if work.matrix is not None:
                _, _, rows, columns = work.matrix
                whole = torch.empty(rows * columns, dtype=self.dtype, device=layout.device)
                places = [slice(f.offset, f.offset + f.length) for f in work.theirs if f]
                for place, part in zip(places, parts, strict=True):
                    whole[place] = part
                done = newton_schulz(whole.view(rows, columns)).flatten()
                parts = [done[place] for place in places]
            parts = _exchange(parts, work.theirs, work.mine, nothing)
            yield from zip([f for f in work.mine if f], parts, strict=True)


def plan_rounds(layout: Layout, index: int) -> list[Round]:
    """Who works on which matrix of the owned tensors `index`, and when: the same plan on every rank.

    A matrix goes to a rank that holds most of it, or half as much as that one, and has least to do: at ZeRO 1
    and 2, where slices are long, nearly all are where they are needed, and at 3 all ranks have equal parts.
    """
    held = [{f.matrix: f for f in tensors[index]} for tensors in layout.fragments]
    work: list[list[int]] = [[] for _ in held]
    loads = [0] * len(held)
    involved = set[int]().union(*held)
    for matrix in sorted(involved, key=lambda m: (-layout.matrices[m].numel, m)):
        lengths = [own[matrix].length if matrix in own else 0 for own in held]
        able = [rank for rank, length in enumerate(lengths) if 2 * length >= max(lengths)]
        chosen = min(able, key=lambda rank: loads[rank])
        work[chosen].append(matrix)
        loads[chosen] += layout.matrices[matrix].numel
    rounds = []
    for number in range(max(map(len, work), default=0)):
        members = [own[number] if number < len(own) else None for own in work]
        own = members[layout.rank]
        rounds.append(
            Round(
                matrix=None if own is None else layout.matrices[own],
                mine=[None if m is None else held[layout.rank].get(m) for m in members],
                theirs=[None if own is None else fragments.get(own) for fragments in held],
            )
        )
    return rounds


def _exchange(
    parts: list[torch.Tensor],
    sent: list[Fragment | None],
    received: list[Fragment | None],
    nothing: torch.Tensor,
) -> list[torch.Tensor]:
    """Send the n-th of `sent` to rank n; what comes of `received`, in the order of ranks. Collective."""
    sizes_in, sizes_out = ([f.length if f else 0 for f in side] for side in (sent, received))
    if len(sent) == 1:
        return parts
    outgoing = torch.cat([nothing, *parts])
    incoming = outgoing.new_empty(sum(sizes_out))
    dist.all_to_all_single(incoming, outgoing, sizes_out, sizes_in)
    return list(incoming.split([size for size in sizes_out if size]))


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of the singular value decomposition, without computing it; zeros stay zeros.

    matrix: [rows, columns]; its dtype is that of the computation
    """
    first, second, third = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T  # the smaller products
    wide = wide / (wide.norm() + EPS)  # singular values of 1 and less
    for _ in range(NUM_STEPS):
        gram = wide @ wide.T
        wide = first * wide + (second * gram + third * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T
