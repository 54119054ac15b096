"""A model's size in, the memory of a rank's share of its state out."""

from typing import Literal

# Bytes for each parameter at ZeRO 3 (Rajbhandari et al. 2020, section 3), with gradients summed in fp32.
WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
GRADIENT_BYTES, MASTER_BYTES, STATE_BYTES = 4, 4, 4


def state_bytes(
    num_parameters: int,
    *,
    world_size: int,
    precision: Literal["bf16", "fp32"],
    num_state: int | None = None,
) -> int:
    """Bytes of weights, gradients, masters and the optimizer's state on each rank at ZeRO 3.

    num_state: of `trainer.optim.state_numel`; None: Adam's two moments of each parameter

    Without activations, the layers that are gathered, and DeepSpeed's buffers, which have a fixed size.
    """
    each = WEIGHT_BYTES[precision] + GRADIENT_BYTES + MASTER_BYTES
    state = STATE_BYTES * (2 * num_parameters if num_state is None else num_state)
    return -(-(num_parameters * each + state) // world_size)
