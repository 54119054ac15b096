"""A run's shape and its DeepSpeed settings in, the memory of one rank out, part by part. No torch.

The formulas are those of Rajbhandari et al. 2020 (ZeRO, section 3), with what DeepSpeed 0.19.8 really holds
beside them, found by following every allocation of a step: docs/plan.md names each. `bench.plan` compares.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from launcher.activation_memory import (
    Batch,
    ends_bytes,
    head_bytes,
    is_checkpointed,
    kept_bytes,
    layer_bytes,
    working_bytes,
)
from model.config import ModelConfig
from model.tasks import TASKS
from trainer.optim_config import OptimConfig

STATE_BYTES = 4  # masters, moments, averages: fp32
NORM_BYTES = 8  # stage 1 and 2 take the norm of each gradient in double
# DeepSpeed's defaults of what a JSON leaves out, in numbers
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
}


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed JSON memory depends on. Buckets are numbers, not bytes."""

    stage: int
    offload_optimizer: bool = False
    offload_param: bool = False
    overlap_comm: bool = False
    reduce_bucket_size: int = DEFAULTS["reduce_bucket_size"]
    persistence_threshold: int = DEFAULTS["stage3_param_persistence_threshold"]
    max_live_parameters: int = DEFAULTS["stage3_max_live_parameters"]

    @property
    def name(self) -> str:
        offloaded = ["optimizer"] if self.offload_optimizer else []
        offloaded += ["weights"] if self.offload_param else []
        return f"{self.stage}" + (f" offload {' + '.join(offloaded)}" if offloaded else "")


@dataclass(frozen=True)
class Rank:
    """All that the memory of one rank depends on."""

    model: ModelConfig
    vocab_size: int
    optim: OptimConfig
    zero: Zero
    batch: Batch
    world_size: int
    accumulation: int = 1  # micro-batches of a step


class Memory(NamedTuple):
    """Bytes of one rank. The peak is of the device; what is offloaded is on the host."""

    weights: int
    gradients: int  # that are held between micro-batches or steps
    masters: int
    optimizer: int
    buffers: int  # DeepSpeed's, for communication
    peak: int  # on the device: all of the above that is there, and activations with what works on them
    host: int  # offloaded, with the buffers for it
    state: int  # on the device, between two steps

    @property
    def total(self) -> int:
        """Of a rank whose device is the CPU: there both are one."""
        return self.peak + self.host


class Parameters(NamedTuple):
    """How many numbers a model has. Closed forms of `model.weights.parameter_shapes`."""

    total: int
    layer: int  # of one layer; ModernBERT's first has one LayerNorm less
    embedding: int  # the vocabulary's matrix, which the output shares: the largest there is
    matrices_of_layers: int


def parameters_of(model: ModelConfig, vocab_size: int) -> Parameters:
    hidden, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    embedding = vocab_size * hidden
    heads = sum(_head_numbers(model, vocab_size, task) for task in model.tasks)
    if model.architecture == "modernbert":
        matrices = 4 * hidden**2 + 3 * hidden * inner
        layer = matrices + 2 * hidden
        ends = 2 * hidden  # norms
        total = embedding + layers * layer - hidden + ends + heads
    else:
        matrices = 4 * hidden**2 + 2 * hidden * inner
        layer = matrices + 9 * hidden + inner
        ends = (model.max_position_embeddings + model.type_vocab_size + 2) * hidden
        total = embedding + layers * layer + ends + heads
    return Parameters(total, layer, embedding, layers * matrices)


def _head_numbers(model: ModelConfig, vocab_size: int, task: str) -> int:
    """Of a task's head; tasks of masked tokens share one, which the first of them counts."""
    hidden, kind = model.hidden_size, TASKS[task]
    if kind.head == "mlm_head":
        first = next(other for other in model.tasks if TASKS[other].head == kind.head)
        vectors = 1 if model.architecture == "modernbert" else 3
        return hidden**2 + vectors * hidden + vocab_size if task == first else 0
    if task == "cpc":
        return hidden**2
    return (kind.index_width * hidden + 1) * hidden + (hidden + 1) * kind.num_classes


def optimizer_numbers(parameters: Parameters, optim: OptimConfig) -> int:
    """Numbers that the optimizer keeps of all parameters, as `trainer.optim.state_numel`."""
    numbers = 2 * parameters.total
    if optim.name == "muon":  # one momentum of a matrix
        numbers -= parameters.matrices_of_layers
    return numbers + (parameters.total if optim.ema_decay is not None else 0)


class _Course(NamedTuple):
    """What a stage adds to its state in the course of a step, in bytes on the device."""

    buckets: int  # for communication, from the beginning of the backward pass
    flat: int  # of gradients, as a whole, when the first bucket of them is full
    of_each: float  # for each parameter whose gradient is there
    of_largest: int  # while the gradient of the vocabulary's matrix is reduced
    carried: int  # from one micro-batch to the next
    reduce: int  # after the last backward pass
    update: int  # in the optimizer's step, to what is carried


def memory_of(rank: Rank) -> Memory:
    """The memory of every rank alike, in bytes."""
    state = _state(rank)
    device = state.state
    peak = device + max(_peaks(rank, _course(rank)))
    return state._replace(peak=round(peak))


def _shares(rank: Rank) -> tuple[int, int, int]:
    """Numbers on a rank of what its stage divides: parameters, the optimizer's, the largest matrix."""
    parameters = parameters_of(rank.model, rank.vocab_size)
    numbers = optimizer_numbers(parameters, rank.optim)
    n = rank.world_size if rank.zero.stage else 1
    return -(-parameters.total // n), -(-numbers // n), -(-parameters.embedding // n)


def _state(rank: Rank) -> Memory:
    """Between two steps; the peak is not known yet."""
    parameters, zero, each = (
        parameters_of(rank.model, rank.vocab_size),
        rank.zero,
        rank.batch.number_bytes,
    )
    mine, numbers, _ = _shares(rank)
    masters = STATE_BYTES * mine
    if zero.stage == 0 and each == STATE_BYTES:
        masters = 0  # the weights themselves
    optimizer, gradients, buffers, host = STATE_BYTES * numbers, 0, 0, 0
    weights = each * (mine if zero.stage == 3 else parameters.total)
    if _sums_in_full(rank):
        gradients = STATE_BYTES * parameters.total
    elif zero.stage == 3:
        gradients = STATE_BYTES * mine
        buffers = each * (zero.reduce_bucket_size + _persistent(rank))
    if zero.offload_optimizer:
        # gradients in fp32, and what goes to and fro in the dtype of the weights
        to_and_fro = each * parameters.embedding if zero.stage < 3 else 0
        host = masters + optimizer + STATE_BYTES * mine + each * mine + to_and_fro
        if zero.stage == 3:
            host += gradients - each * mine
        elif rank.batch.device_type != "cpu":
            host += STATE_BYTES * mine  # gradients of several micro-batches
        masters = optimizer = gradients = 0
        buffers += to_and_fro
    if zero.offload_param:
        host, weights = host + weights, 0
    state = weights + gradients + masters + optimizer + buffers
    return Memory(weights, gradients, masters, optimizer, buffers, 0, host, state)


def _persistent(rank: Rank) -> int:
    """Numbers of the small weights that every rank keeps whole at stage 3, beside its part."""
    parameters, model, zero = parameters_of(rank.model, rank.vocab_size), rank.model, rank.zero
    if rank.world_size == 1:
        return 0
    squares, layers = model.hidden_size**2, model.num_hidden_layers
    halves = 2 if model.architecture == "modernbert" else 1
    to_inner = halves * model.hidden_size * model.intermediate_size
    matrices = [(3 * squares, layers), (squares, layers + 2), (to_inner, layers),
                (to_inner // halves, layers), (parameters.embedding, 1)]  # fmt: skip
    large = sum(size * number for size, number in matrices if size > zero.persistence_threshold)
    return parameters.total - large


def _sums_in_full(rank: Rank) -> bool:
    """Stage 1 in bf16 adds gradients up in fp32 on every rank, undivided: DeepSpeed's BF16_Optimizer."""
    zero = rank.zero
    return zero.stage == 1 and not zero.offload_optimizer and rank.batch.precision == "bf16"


def _course(rank: Rank) -> _Course:
    parameters, zero, each = (
        parameters_of(rank.model, rank.vocab_size),
        rank.zero,
        rank.batch.number_bytes,
    )
    mine, _, _ = _shares(rank)
    whole, largest = parameters.total, parameters.embedding
    mine_of_largest = min(mine, largest)  # partitions are cut from one flat tensor
    has_many = rank.world_size > 1
    gathered = each * whole if has_many and rank.batch.device_type == "cpu" else 0  # gloo's copy
    if zero.stage == 0 or _sums_in_full(rank):
        sums = STATE_BYTES if zero.stage == 0 and each < STATE_BYTES else 0
        flattened = STATE_BYTES + each if zero.stage else each  # to be reduced, and in its dtype
        reduce = flattened * whole if has_many else 0
        return _Course(0, 0, each, 0, each * whole, reduce, max(sums * whole, gathered))
    if zero.stage == 3:
        return _Course(0, 0, 0, 2 * each * largest, 0, 0, STATE_BYTES * mine)
    buckets = each * zero.reduce_bucket_size * (2 if zero.overlap_comm else 1)
    update = max(NORM_BYTES * mine_of_largest, gathered)
    flat = STATE_BYTES * mine
    if zero.offload_optimizer and rank.batch.device_type != "cpu":
        flat = update = 0  # on the host
    if zero.stage == 1:  # in fp32: gradients stay whole until the step
        return _Course(buckets, flat, each, 0, each * whole, 0, update)
    return _Course(buckets, flat, 0, STATE_BYTES * mine_of_largest, flat, 0, update)


def _peaks(rank: Rank, course: _Course) -> Iterator[float]:
    """Bytes over the state at every moment of a step that may be its highest."""
    model, batch = rank.model, rank.batch
    parameters = parameters_of(model, rank.vocab_size)
    head = head_bytes(model, rank.vocab_size, batch)
    each, layers = batch.number_bytes, range(model.num_hidden_layers)
    base = _gathered(rank) + (course.carried if rank.accumulation > 1 else 0)
    ends = ends_bytes(model, batch)
    held = base + ends + sum(kept_bytes(model, batch, layer) for layer in layers) + head.gradient
    output = batch.num_tokens * model.hidden_size * each
    yield held + output + head.working
    yield held + head.scaled
    tied = each * parameters.embedding  # the head's part waits for that of the embeddings
    held += tied - head.gradient + course.buckets
    # later micro-batches add to what the first has allocated
    flat = 0 if rank.accumulation > 1 and course.carried == course.flat else course.flat
    passed = model.hidden_size**2  # of the heads
    for layer in reversed(layers):
        again = 0
        if is_checkpointed(model, layer):
            again = layer_bytes(model, batch, layer) - kept_bytes(model, batch, layer)
        yield held + again + working_bytes(model, batch) + each * parameters.layer
        passed += parameters.layer
        if passed >= rank.zero.reduce_bucket_size:
            held, flat = held + flat, 0
        held += course.of_each * parameters.layer - kept_bytes(model, batch, layer)
    yield held + flat + tied + course.of_largest
    grown = (
        base + (course.flat if rank.accumulation == 1 else 0) + course.of_each * parameters.total
    )
    yield grown + course.reduce
    yield grown + course.update


def _gathered(rank: Rank) -> int:
    """Weights that stage 3 has together at once: all of them, where they are fewer than it may keep."""
    zero = rank.zero
    if zero.stage < 3 or (rank.world_size == 1 and not zero.offload_param):
        return 0
    whole = parameters_of(rank.model, rank.vocab_size).total
    return rank.batch.number_bytes * min(whole, zero.max_live_parameters)


def zero_of(config: Mapping[str, Any]) -> Zero:
    """From a DeepSpeed JSON that `trainer.ds.read_deepspeed_json` has checked."""
    zero = {**DEFAULTS, **config["zero_optimization"]}
    stage = zero["stage"]
    return Zero(
        stage,
        offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        offload_param=zero.get("offload_param", {}).get("device", "none") != "none",
        overlap_comm=bool(zero.get("overlap_comm", stage == 3)),  # DeepSpeed's own default
        reduce_bucket_size=int(zero["reduce_bucket_size"]),
        persistence_threshold=int(zero["stage3_param_persistence_threshold"]),
        max_live_parameters=int(zero["stage3_max_live_parameters"]),
    )
