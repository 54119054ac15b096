"""What one rank's optimizer owns of each parameter, as views: copied out for a checkpoint, filled from one.

ZeRO keeps flat partitions that end in the middle of tensors. A fragment is the run of a flattened tensor
that lies in this rank's partition; all ranks' fragments of a tensor lie end to end. So a checkpoint costs no
communication, and is read at any stage and world size.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from trainer.engine import NamedState


class Fragment(NamedTuple):
    start: int  # in the flattened tensor
    values: torch.Tensor  # fp32 [n], n > 0: a view


def local_fragment(named: "NamedState", name: str, part: str) -> Fragment | None:
    """This rank's fragment, None where it owns nothing of it. At stage 0 every rank has the whole tensor."""
    parameter, key = named.parameters[name], None if part == "master" else part
    if named.stage == 0:
        return Fragment(0, named.whole_at_stage_0(name, part).view(-1))
    if named.stage == 3:
        # with padding, which the last ranks have where a tensor does not divide by the ranks
        owned, _ = named.wrapper._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=key
        )
        start = named.rank * owned.numel()
        length = min(owned.numel(), parameter.ds_numel - start)
        return Fragment(start, owned.detach()[:length]) if length > 0 else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    values = mapping.get_hp_fragment(key).detach().view(-1)
    return Fragment(mapping.lp_fragment_address.start, values)


def share_out(sizes: dict[str, int], world_size: int) -> dict[str, int]:
    """Which rank writes which tensor that all have: the largest first, each to the rank with least so far."""
    loads, owners = [0] * world_size, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        owners[name] = rank
        loads[rank] += sizes[name]
    return owners
