"""A model, an optimizer and a DeepSpeed configuration in, a ready engine out; and what a loop asks of it."""

import importlib
import math
import os
import tempfile
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler

from model.pretraining import ForPreTraining
from model.weights import stacked_matrices
from trainer.exit_status import NotJoined
from trainer.joining import store_of_this_start
from trainer.named_state import MASTER, Engine, NamedState
from trainer.optim import build_optimizer
from trainer.optim_config import OptimConfig
from trainer.partitions import EMA, PartitionedOptimizer, find_layout, find_matrices
from trainer.world import LEAST_COLLECTIVE_TIMEOUT, World, device_of, read_environment


def start_world(timeout: timedelta = LEAST_COLLECTIVE_TIMEOUT) -> World:
    """Join the process group (NCCL on GPUs, gloo on CPUs). A single process needs no launcher.

    timeout: of every collective, and of waiting for the other processes. NotJoined when some do not come, or
    the port of MASTER_PORT is taken.
    """
    rank, size, local_rank = read_environment()
    device = device_of(local_rank)
    store = None  # torch's own, for which rank 0 listens on all interfaces
    if size == 1 and "RANK" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] - in this process's memory
    _leave_out_shared_memory_op()
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store = store or store_of_this_start(rank, size, timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
        raise NotJoined(
            f"rank {rank} of {size} could not join the others at {place}: {error}. Each of the {size} "
            f"processes has to be started within {timeout.total_seconds():.0f} s, with the same MASTER_ADDR "
            "and MASTER_PORT; the port must be free on the first machine, and open to the others"
        ) from error
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    if dist.get_world_size() != size:
        raise RuntimeError(f"{size} processes were started, {dist.get_world_size()} joined")
    host_group = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else None
    return World(rank, size, local_rank, device, host_group)


def stop_world() -> None:
    """Wait at the end of a run until no rank needs the others any more. Collective."""
    dist.barrier()


def _leave_out_shared_memory_op() -> None:
    """DeepSpeed compiles a C++ op at start on CPUs that only its inference uses.

    A process killed meanwhile leaves a lock behind, and every later DeepSpeed run of the account
    then waits for it for ever without a word. Nothing else is compiled here; were it, then in a
    folder of its own.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    own = Path(tempfile.gettempdir()) / f"torch-extensions-{os.getuid()}-{os.getpid()}"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own))


def materialise(model: ForPreTraining, config: dict[str, Any], device: torch.device) -> None:
    """Give a model on the meta device memory for its weights, zero for now, in the dtype it computes in.

    At stage 3 each part is divided among the ranks before the next is made: none holds the whole model.
    Collective there.
    """
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    is_partitioned = config["zero_optimization"]["stage"] == 3
    model.untie()  # output weights are the embeddings' own
    for part in (model.embeddings, *model.layers, *model.children()):
        if all(not parameter.is_meta for parameter in part.parameters()):
            continue
        part.to(dtype).to_empty(device=device)
        for parameter in part.parameters():
            torch.nn.init.zeros_(parameter)
        if is_partitioned:
            deepspeed.zero.Init(module=part, config_dict_or_path=config, dtype=dtype)
    model.tie()


def build_engine(
    model: ForPreTraining,
    weights: Iterable[tuple[str, torch.Tensor]],
    optim: OptimConfig,
    config: dict[str, Any],
    device: torch.device,
) -> Engine:
    """Wrap a model from the meta device, with `weights` as its exact fp32 master weights. Collective.

    weights: name and fp32 value of each; one is held at a time, and an average of weights begins with it.
    DeepSpeed makes masters from what is in the model, in bf16, and some stages have made an Adam step with
    zero gradients by now: both are put right.
    """
    materialise(model, config, device)
    _import_muon_uncompiled()
    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    optimizer = build_optimizer(model, optim, dtype)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    state = NamedState(engine)
    state.begin_load(optimizer_step=0)
    for name, value in weights:
        for part in (MASTER, EMA):
            if part in state.parts(name):
                state.load(name, part, value)
    state.end_load()
    if isinstance(optimizer, PartitionedOptimizer):
        shapes = {name: state.shape(name) for name in state.parameters}
        optimizer.layout = find_layout(
            find_matrices(shapes, stacked_matrices(model.config)),
            state.owned(),
            state.pieces(),
            is_partitioned=state.stage > 0,
            device=device,
        )
    return engine


def _import_muon_uncompiled() -> None:
    """Every ZeRO optimizer imports DeepSpeed's own Muon, whose decorators load all of torch.compile.

    Nothing here calls it, and that is a quarter of the time in which a process starts.
    """
    compile_function = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_function


def set_learning_rate(engine: Engine, learning_rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def set_accumulation(engine: Engine, number: int, accumulation: int) -> None:
    """Say before each micro-batch which of the step's it is: how many there are may change with a phase.

    DeepSpeed would count them itself by the number it was initialized with; and its offload takes
    the norm of the last micro-batch alone where it thinks that there is one only.
    """
    engine.set_gradient_accumulation_boundary(number + 1 == accumulation)
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = accumulation


def step(engine: Engine) -> None:
    """`engine.step()`: updates the weights after the last micro-batch, else does nothing.

    A gradient with NaN or infinity in it changes nothing: DeepSpeed sees to that, but at stage 0 in fp32. There
    it would step with it, and it clips the gradient without telling its norm.
    """
    if engine.optimizer is engine.basic_optimizer and engine.is_gradient_accumulation_boundary():
        parameters = [p for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        engine._global_grad_norm = norm
        if not math.isfinite(norm):
            engine.set_gradient_accumulation_boundary(False)  # it counts, and leaves all as it is
            engine.module.zero_grad()
    engine.step()
    if getattr(engine.optimizer, "overflow", False) and hasattr(
        engine.optimizer, "averaged_gradients"
    ):
        # with offload DeepSpeed keeps the NaN in its sum of gradients, and passes over all that follows
        engine.optimizer.averaged_gradients.update(
            dict.fromkeys(engine.optimizer.averaged_gradients)
        )


def gradient_norm(engine: Engine) -> float:
    """Global norm of the last step's gradient, before clipping; infinite where the step was passed over."""
    return float(engine.get_global_grad_norm())
