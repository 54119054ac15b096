"""A layer and its input in, its output out; what the backward pass needs is kept, or computed again."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from model.config import ModelConfig

aten = torch.ops.aten
# Projections: most of the time, a third of the memory. Not bmm: scores are large.
PRODUCTS = frozenset({aten.mm.default, aten.addmm.default})
# Fused attention, and which argument is its dropout
ATTENTION = {
    aten._scaled_dot_product_flash_attention.default: 3,
    aten._scaled_dot_product_flash_attention_for_cpu.default: 3,
    aten._scaled_dot_product_efficient_attention.default: 5,
    aten._scaled_dot_product_cudnn_attention.default: 5,
    aten._flash_attention_forward.default: 7,
}


def run_layer(
    config: ModelConfig, number: int, layer: nn.Module, hidden_TD: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    """`layer(hidden_TD, *arguments)`, checkpointed as the configuration says for layer `number`.

    Dropout draws the same again. "full" keeps the input alone (Chen et al. 2016), "selective" the results of
    matrix products too, so that only what is cheap is computed twice.
    """
    mode = config.activation_checkpointing
    if mode == "none" or number % config.checkpoint_every or not torch.is_grad_enabled():
        return layer(hidden_TD, *arguments)
    if mode == "full":
        return checkpoint(layer, hidden_TD, *arguments, use_reentrant=False)
    return checkpoint(layer, hidden_TD, *arguments, use_reentrant=False, context_fn=_keep_products)


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """What is kept does not run again, and draws no random numbers then: all after it would be others.

    So attention is kept where it draws none. That of `model.short_rows` (cloze) never does: it is given a seed.
    """
    del context
    is_kept = operation in PRODUCTS or operation.namespace == "cloze"
    if operation in ATTENTION:
        place = ATTENTION[operation]
        dropout = arguments[place] if len(arguments) > place else options.get("dropout_p", 0.0)
        is_kept = dropout == 0
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
