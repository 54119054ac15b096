"""An engine in, its state by parameter name out and in again, whatever the ZeRO stage.

`NamedState` reads and writes fp32 master weights and the optimizer's other parts: what a checkpoint
holds has no partition in it, so it continues at any stage and world size.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from trainer.partitions import Piece
from trainer.world import AgreedError, World

Engine = Any  # deepspeed.DeepSpeedEngine, whose attributes no type checker can follow
MASTER = "master"  # the part that every parameter has; the others are its optimizer's state


class NamedState:
    """Master weights and optimizer state of an engine, by parameter name.

    `get` and everything that begins, does or ends a load are collective.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.stage = engine.zero_optimization_stage()
        self.parameters: dict[str, Any] = dict(
            engine.module.named_parameters()
        )  # tied weights appear once
        self.base: Any = (
            engine.basic_optimizer
        )  # torch's optimizer, over flat partitions for stages 1-3
        self.wrapper: Any = engine.optimizer
        self._parts: dict[str, tuple[str, ...]] = {
            name: (MASTER, *group["moments"])
            for group in self.base.param_groups
            for name in group["names"]
        }

    def parts(self, name: str) -> tuple[str, ...]:
        """What a checkpoint holds of a parameter: its master, then the optimizer's state of it."""
        return self._parts[name]

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def owned(self) -> list[torch.Tensor]:
        """The tensors that this rank's optimizer steps; equally many on every rank."""
        return [tensor for tensor, _ in self._owned_by_optimizer()]

    def pieces(self) -> Iterator[Piece]:
        """Where each parameter lies in them. At ZeRO 0 each is one of them."""
        index_of = {tensor: index for index, tensor in enumerate(self.owned())}
        masters = self._masters_of_stage_0() if self.stage == 0 else {}
        for name, parameter in self.parameters.items():
            numel = self.shape(name).numel()
            if self.stage == 0:
                yield Piece(name, index_of[masters[parameter]], 0, 0, numel)
            elif self.stage == 3:
                identity = self.wrapper.get_param_id(parameter)
                owned, start, length = self.wrapper.grad_position[identity]
                offset = length * self.rank  # the last ranks' slices end in padding
                yield Piece(name, owned, start, offset, max(0, min(length, numel - offset)))
            elif (mapping := parameter._hp_mapping) is not None:
                high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield Piece(name, mapping.param_group_index, high.start, low.start, low.numel)

    def shape(self, name: str) -> torch.Size:
        parameter = self.parameters[name]
        return parameter.ds_shape if self.stage == 3 else parameter.shape

    @property
    def optimizer_step(self) -> int:
        """Adam's own step count (it falls behind the run's when a step was skipped)."""
        steps = {int(state["step"]) for state in self.base.state.values() if "step" in state}
        assert len(steps) <= 1, f"parameters disagree on the optimizer step: {steps}"
        # A rank can own nothing but padding; its peers then know better.
        local = torch.tensor([steps.pop() if steps else 0], device=self.engine.device)
        dist.all_reduce(local, op=dist.ReduceOp.MAX)
        return int(local)

    def get(self, name: str, part: str) -> torch.Tensor:
        """fp32, full shape, a copy, on every rank."""
        parameter = self.parameters[name]
        if self.stage == 0:
            return self.whole_at_stage_0(name, part).clone()
        if self.stage == 3:
            full = parameter._z3_optimizer.get_full_hp_param(parameter, _key(part))
        else:
            full = parameter.get_full_hp_param(_key(part))
        return full.detach().clone()

    def begin_load(self, optimizer_step: int) -> None:
        """Give all that the optimizer owns zero state and a step count. Then `load` each parameter."""
        for owned, moments in self._owned_by_optimizer():
            self.base.state[owned] = {
                "step": torch.tensor(
                    float(optimizer_step), dtype=torch.float32, device=owned.device
                ),
                **{key: torch.zeros_like(owned, dtype=torch.float32) for key in moments},
            }
        if self.stage in (1, 2):
            self.wrapper._hp_optimizer_states_linked = False
            self.wrapper._lazy_init_hp_params_optimizer_state()

    def load(self, name: str, part: str, value: torch.Tensor) -> None:
        """Write one full fp32 tensor; each rank keeps its own part of it."""
        parameter = self.parameters[name]
        if value.shape != self.shape(name):
            raise ValueError(
                f"{part} of {name} has shape {tuple(value.shape)}, not {tuple(self.shape(name))}"
            )
        if self.stage == 0:
            self.whole_at_stage_0(name, part).copy_(value)
        elif self.stage == 3:
            self._load_stage_3(parameter, part, value)
        elif parameter._hp_mapping is not None:  # None: this rank holds no part of it
            parameter.set_full_hp_param(value.to(torch.float32), _key(part))
        if part == MASTER and self.stage < 3:
            parameter.data.copy_(value)

    def whole_at_stage_0(self, name: str, part: str) -> torch.Tensor:
        """The tensor itself, which every rank has."""
        master = self._masters_of_stage_0()[self.parameters[name]]
        return master.detach() if part == MASTER else self.base.state[master][part]

    def refresh(self) -> None:
        """Make the weights that are computed with follow the masters. Collective."""
        if self.stage == 0:
            for low, master in self._masters_of_stage_0().items():
                low.data.copy_(master.data)
        elif self.stage == 3:
            self.end_load()
        else:
            self.wrapper.update_lp_params()

    def check_replicas(self, world: World) -> None:
        """That all ranks compute with the same weights. Collective. ValueError naming who differs.

        A flipped bit in one rank's memory would otherwise be averaged into everything. Stage 3 has no replicas.
        """
        if self.stage == 3 or world.size == 1:
            return
        sums = [_bits(parameter.data).sum() for parameter in self.parameters.values()]
        every = world.gather(torch.stack(sums).tolist())
        wrong = {
            name: [found[i] for found in every]
            for i, name in enumerate(self.parameters)
            if len({found[i] for found in every}) > 1
        }
        if wrong:
            values = next(iter(wrong.values()))
            odd = [r for r, value in enumerate(values) if values.count(value) <= len(values) / 2]
            raise AgreedError(
                f"ranks {odd} hold other weights than the rest in {', '.join([*wrong][:3])} ({len(wrong)} "
                "in all): memory or a link is faulty there. Nothing is saved of this; leave that machine out"
            )

    def end_load(self) -> None:
        """Make the compute weights of stage 3 follow the masters just loaded."""
        if self.stage != 3:
            return
        for low, high in zip(
            self.wrapper.fp16_partitioned_groups_flat,
            self.wrapper.fp32_partitioned_groups_flat,
            strict=True,
        ):
            low.data.copy_(high.data)
        persistent = self.wrapper.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def _owned_by_optimizer(self) -> list[tuple[torch.Tensor, tuple[str, ...]]]:
        """The tensors the optimizer steps, and its state of each: masters at stage 0, else flat partitions."""
        groups = self.base.param_groups
        if self.stage == 3:  # it lends the optimizer one sub-group at a time
            group_of = self.wrapper.sub_group_to_group_id
            flat = self.wrapper.fp32_partitioned_groups_flat
            return [(owned, groups[group_of[i]]["moments"]) for i, owned in enumerate(flat)]
        return [(owned, group["moments"]) for group in groups for owned in group["params"]]

    def _masters_of_stage_0(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        if self.wrapper is self.base:  # fp32: the module's own parameters
            return {p: p for p in self.parameters.values()}
        pairs: Iterable[Any] = zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups, strict=True)
        return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}

    def _load_stage_3(self, parameter: Any, part: str, value: torch.Tensor) -> None:
        # set_full_hp_param reads past the end where a tensor does not divide by the ranks.
        target, _ = self.wrapper._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=_key(part)
        )
        flat = torch.zeros(
            target.numel() * dist.get_world_size(), dtype=torch.float32, device=value.device
        )
        flat[: value.numel()] = value.flatten()
        target.data.copy_(flat.narrow(0, target.numel() * dist.get_rank(), target.numel()))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The values' bits as integers: equal sums mean equal tensors, but for chance."""
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).to(torch.int64)


def _key(part: str) -> str | None:
    return None if part == MASTER else part
