"""Muon (Jordan et al. 2024) on ZeRO's partitions.

    b = momentum b + g
    o = NewtonSchulz(g + momentum b)                              Nesterov; 5 steps; about U V^T
    w = (1 - lr weight_decay) w - lr 0.2 sqrt(max(rows, columns)) o

The factor (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2) gives updates the root mean
square of AdamW's, so both take the same learning rate and decay. Only the layers' matrices are updated so;
embeddings, heads and vectors by AdamW. Matrices that are stacked in one weight are orthogonalised one by one.

Momentum is elementwise, and stays in ZeRO's slices. Then each matrix is gathered on one rank, which
orthogonalises it and gives every other its slice back: in rounds of as many matrices as there are ranks, of
like sizes, so that all work at once and none holds more than one matrix beside its slice.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from trainer.partitions import Fragment, Item, Layout, PartitionedOptimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steep at 0: singular values end between 0.7 and 1.2
NUM_STEPS = 5
EPS = 1e-7
Held = list[dict[int, Fragment]]  # of each rank, by matrix


class Muon(PartitionedOptimizer):
    """Rule "muon" of the layers' matrices.

    dtype: of Newton-Schulz, and of what the ranks exchange; bf16, as its authors have it, where the model
        computes in bf16
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype) -> None:
        super().__init__(groups)
        self.dtype = dtype

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
        index, matrices = layout.owned[owned], layout.matrices
        held = [{f.matrix: f for f in tensors[index]} for tensors in layout.fragments]
        involved = sorted(
            set[int]().union(*held), key=lambda m: (matrices[m].rows, matrices[m].columns, m)
        )
        for first in range(0, len(involved), len(held)):
            members = involved[first : first + len(held)]
            yield from self._round(members, held, direction, layout)

    def _round(
        self, members: list[int], held: Held, direction: torch.Tensor, layout: Layout
    ) -> Iterator[tuple[Fragment, torch.Tensor]]:
        """The n-th of `members` is gathered, orthogonalised and given back by rank n."""
        mine = [held[layout.rank].get(matrix) for matrix in members]
        mine += [None] * (len(held) - len(members))
        at_work = layout.rank < len(members)
        theirs = [own.get(members[layout.rank]) if at_work else None for own in held]
        parts = [f.of(direction).to(layout.device, self.dtype) for f in mine if f]
        nothing = torch.empty(0, dtype=self.dtype, device=layout.device)
        parts = _exchange([*parts, nothing], mine, theirs)
        if at_work:
            _, _, rows, columns = layout.matrices[members[layout.rank]]
            whole = torch.empty(rows * columns, dtype=self.dtype, device=layout.device)
            places = [slice(f.offset, f.offset + f.length) for f in theirs if f]
            for place, part in zip(places, parts, strict=True):
                whole[place] = part
            done = newton_schulz(whole.view(rows, columns)).flatten()
            parts = [done[place] for place in places]
        parts = _exchange([*parts, nothing], theirs, mine)
        yield from zip([f for f in mine if f], parts, strict=True)


def _exchange(
    parts: list[torch.Tensor], sent: list[Fragment | None], received: list[Fragment | None]
) -> list[torch.Tensor]:
    """Send the n-th of `sent` to rank n; what comes of `received`, in the order of ranks. Collective."""
    sizes_in, sizes_out = ([f.length if f else 0 for f in side] for side in (sent, received))
    flat = torch.cat(parts)
    if len(sent) > 1:
        outgoing, flat = flat, flat.new_empty(sum(sizes_out))
        dist.all_to_all_single(flat, outgoing, sizes_out, sizes_in)
    return list(flat.split([size for size in sizes_out if size]))


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
