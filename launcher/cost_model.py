"""Work, links and speeds in, the seconds of a step out. No torch.

A step is its operations, an exchange between ranks, and an update. How far the exchange hides behind the
operations depends on the network and cannot be known beforehand, so both ends are given.
"""

from dataclasses import dataclass
from typing import NamedTuple

from launcher.activation_memory import BYTES_OF
from launcher.memory_plan import Rank, optimizer_numbers, parameters_of

# Bytes/s of a rank's share of its host's memory, and of the link to it, where the update is offloaded
HOST_MEMORY, HOST_LINK = 10e9, 20e9
# Memory of devices in bytes and bytes/s, of the vendors' data sheets, by torch.cuda.get_device_name()
DEVICES = {
    "NVIDIA B200": (180e9, 8.0e12),
    "NVIDIA GH200 480GB": (96e9, 4.0e12),
    "NVIDIA H200": (141e9, 4.8e12),
    "NVIDIA H200 NVL": (141e9, 4.8e12),
    "NVIDIA H100 80GB HBM3": (80e9, 3.35e12),
    "NVIDIA H100 NVL": (94e9, 3.9e12),
    "NVIDIA H100 PCIe": (80e9, 2.0e12),
    "NVIDIA H800": (80e9, 3.35e12),
    "NVIDIA H20": (96e9, 4.0e12),
    "NVIDIA A100-SXM4-40GB": (40e9, 1.555e12),
    "NVIDIA A100-SXM4-80GB": (80e9, 2.039e12),
    "NVIDIA A100-PCIE-40GB": (40e9, 1.555e12),
    "NVIDIA A100 80GB PCIe": (80e9, 1.935e12),
    "NVIDIA A800-SXM4-80GB": (80e9, 2.039e12),
    "NVIDIA A800 80GB PCIe": (80e9, 1.935e12),
    "NVIDIA A30": (24e9, 933e9),
    "NVIDIA A10": (24e9, 600e9),
    "NVIDIA L40S": (48e9, 864e9),
    "NVIDIA L40": (48e9, 864e9),
    "NVIDIA L4": (24e9, 300e9),
}


@dataclass(frozen=True)
class Links:
    """How fast ranks reach each other, in bytes/s in one direction."""

    ranks_per_node: int
    link: float  # of one rank, within a node
    node_link: float  # of one node, of all its network cards together


class Exchange(NamedTuple):
    """Bytes that a rank sends in one optimizer step, by what sends them."""

    gradients: int
    weights: int

    @property
    def total(self) -> int:
        return self.gradients + self.weights


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. `hidden`: all of the exchange behind the operations; `exposed`: none."""

    compute: float
    exchange: float
    update: float

    @property
    def hidden(self) -> float:
        return max(self.compute, self.exchange) + self.update

    @property
    def exposed(self) -> float:
        return self.compute + self.exchange + self.update


def ring_bytes(num_bytes: float, world_size: int) -> float:
    """Sent by a rank in a reduce-scatter, or an all-gather; an all-reduce is both (Patarasu and Yuan 2009)."""
    return num_bytes * (world_size - 1) / world_size


def exchange_of(rank: Rank) -> Exchange:
    """As Rajbhandari et al. 2020 (section 7), but for what DeepSpeed does with several micro-batches.

    Stages 0 and 1 in bf16 reduce once a step. Stage 2, and 1 with offload or in fp32, reduce in every
    micro-batch what they keep divided, and stage 3 also gathers the weights in each, forward and backward.
    All in the dtype of the weights.
    """
    zero, each = rank.zero, BYTES_OF[rank.batch.precision]
    one = ring_bytes(each * parameters_of(rank.model, rank.vocab_size).total, rank.world_size)
    times = rank.accumulation
    if zero.stage == 0:
        return Exchange(round(2 * one), 0)
    if zero.stage == 1:
        often = zero.offload_optimizer or rank.batch.precision == "fp32"
        return Exchange(round(2 * one * (times if often else 1)), round(one))
    return Exchange(round(times * one), round(one * (2 * times if zero.stage == 3 else 1)))


def exchange_seconds(num_bytes: float, world_size: int, links: Links) -> float:
    """Of rings through all ranks: the slower of the links within a node and those between nodes counts."""
    if world_size == 1:
        return 0.0
    within = num_bytes / links.link if links.ranks_per_node > 1 else 0.0
    between = num_bytes / links.node_link if world_size > links.ranks_per_node else 0.0
    return max(within, between)


def update_bytes(rank: Rank) -> int:
    """Read and written by a rank's update: gradient (norm, clipping, step), master and state, new weights."""
    parameters = parameters_of(rank.model, rank.vocab_size)
    shares = rank.world_size if rank.zero.stage else 1
    numbers = 8 * optimizer_numbers(parameters, rank.optim) + (16 + 8) * parameters.total
    return round(numbers / shares) + BYTES_OF[rank.batch.precision] * parameters.total


def recomputed(rank: Rank) -> float:
    """Operations that are really done, over those that count: full checkpointing repeats the forward pass."""
    if rank.model.activation_checkpointing != "full":
        return 1.0
    layers = rank.model.num_hidden_layers
    return 1 + len(range(0, layers, rank.model.checkpoint_every)) / layers / 3


def step_time(
    rank: Rank, flops: float, *, flops_per_second: float, memory_per_second: float, links: Links
) -> StepTime:
    """flops: that the whole step needs, over all ranks. flops_per_second: a rank's, when it computes; of those
    that count, without checkpointing. memory_per_second: bytes, of the device. With offload the update
    runs at the speed of the host, and gradients and weights go to it and back.
    """
    compute = flops / rank.world_size / flops_per_second * recomputed(rank)
    exchange = exchange_seconds(exchange_of(rank).total, rank.world_size, links)
    if not rank.zero.offload_optimizer or rank.batch.device_type == "cpu":
        return StepTime(compute, exchange, update_bytes(rank) / memory_per_second)
    mine = parameters_of(rank.model, rank.vocab_size).total / rank.world_size
    to_and_fro = BYTES_OF[rank.batch.precision] * mine * (rank.accumulation + 1)
    return StepTime(compute, exchange, update_bytes(rank) / HOST_MEMORY + to_and_fro / HOST_LINK)
