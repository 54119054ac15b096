"""LAMB (You et al. 2020, algorithm 2) on ZeRO's partitions.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w
    w = w - lr |w| / |u| u       the ratio is 1 where either norm is 0

Norms are of whole matrices, whoever holds what of them: each rank adds up its squares, and one small vector
is summed over the ranks. Biases and LayerNorm have no ratio and no decay, as in the authors' code. Queries,
keys and values, fused in one projection here, have a ratio each, as in a BERT that keeps them apart.
"""

import torch
import torch.distributed as dist

from trainer.partitions import Item, Layout, PartitionedOptimizer


class Lamb(PartitionedOptimizer):
    """Rule "lamb" of matrices; AdamW is LAMB without a ratio."""

    def update(self, items: list[Item], layout: Layout) -> None:
        updates = [_adam_update(item) for item in items]
        ratios = _trust_ratios(items, updates, layout)
        for item, update in zip(items, updates, strict=True):
            local = ratios.to(item.owned.device, torch.float32)
            for fragment in layout.mine(item.owned):
                # padding at the end of a partition is in no fragment, and stays as it is
                fragment.of(item.owned).addcmul_(
                    fragment.of(update), local[fragment.matrix], value=-item.group["lr"]
                )


def _adam_update(item: Item) -> torch.Tensor:
    """Adam's direction and the decay, before any learning rate."""
    beta1, beta2 = item.group["betas"]
    mean, square = item.state["exp_avg"], item.state["exp_avg_sq"]
    mean.lerp_(item.gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(item.gradient, item.gradient, value=1 - beta2)
    step = item.state["step"].double()  # in fp32, 1 - beta2^t loses digits at first
    root = (square / (1 - beta2**step)).sqrt_().add_(item.group["eps"])
    update = (mean / (1 - beta1**step)).div_(root)
    return update.add_(item.owned, alpha=item.group["weight_decay"])


def _trust_ratios(items: list[Item], updates: list[torch.Tensor], layout: Layout) -> torch.Tensor:
    """|w| / |u| of every matrix in these items; one all-reduce."""
    squares = torch.zeros(2, len(layout.matrices), dtype=torch.float64, device=layout.device)
    for item, update in zip(items, updates, strict=True):
        fragments = layout.mine(item.owned)
        if not fragments:  # nothing but padding
            continue
        indices = [fragment.matrix for fragment in fragments]
        for row, tensor in enumerate((item.owned, update)):
            norms = [
                torch.linalg.vector_norm(fragment.of(tensor), dtype=torch.float64)
                for fragment in fragments
            ]
            squares[row, indices] = torch.stack(norms).square().to(layout.device)
    if layout.is_partitioned:
        dist.all_reduce(squares)
    weight, update = squares.sqrt()
    return torch.where((weight > 0) & (update > 0), weight / update, 1.0)
