"""What one rank's optimizer owns of each parameter, as views: copied out for a checkpoint, filled from one.

ZeRO keeps flat partitions that end in the middle of tensors. A fragment is the run of a flattened tensor
that lies in this rank's partition; all ranks' fragments of a tensor lie end to end. So a checkpoint costs no
communication, and is read at any stage and world size.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from trainer.named_state import NamedState


class StoredFragment(NamedTuple):
    name: str  # of the parameter
    part: str  # "master", or a key of the optimizer's state
    start: int  # in the flattened tensor
    values: torch.Tensor  # fp32 [n], n > 0: a view


def local_fragments(named: "NamedState") -> Iterator[StoredFragment]:
    """All of this rank. At stage 0 every rank has every tensor whole."""
    owned = named.owned()
    for piece in named.pieces():
        if piece.length == 0:  # nothing but padding
            continue
        master = owned[piece.owned]
        for part in named.parts(piece.name):
            tensor = master if part == "master" else named.base.state[master][part]
            values = tensor.detach().view(-1).narrow(0, piece.start, piece.length)
            yield StoredFragment(piece.name, part, piece.offset, values)


def share_out(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """Which rank writes which tensor that all have: the largest first, each to the rank with least so far."""
    loads, owners = [0] * world_size, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        owners[name] = rank
        loads[rank] += sizes[name]
    return owners
