"""A plan in, the text that a person reads out."""

from typing import TYPE_CHECKING

from launcher.cost_model import exchange_of
from launcher.memory_plan import optimizer_numbers, parameters_of
from launcher.tables import bytes_text, text_table

if TYPE_CHECKING:
    from launcher.plan import Plan, Planned

DAY = 86_400


def plan_text(plan: "Plan") -> str:
    """Size, memory of the preset's own setting, other settings, advice, time, disk."""
    parts = [_size(plan), _own(plan), _offers(plan), _advice(plan), _time(plan), _disk(plan)]
    return "\n\n".join(parts)


def _size(plan: "Plan") -> str:
    machine, total = plan.machine, parameters_of(plan.run.model, plan.vocab_size).total
    lines = [
        f"{total:,} parameters, with a vocabulary of {plan.vocab_size:,}; {plan.num_ranks:,} ranks, "
        f"{machine.device}, {bytes_text(machine.memory)} each"
    ]
    for phase in plan.phases:
        lines.append(
            f"from step {phase.first_step:,}: {phase.num_tokens:,} tokens a step in rows of "
            f"{phase.rank.batch.sequence_length}, {phase.flops / phase.num_tokens:.3g} FLOPs a token, "
            f"{phase.flops:.3g} a step"
        )
    return "\n".join(lines)


def _own(plan: "Plan") -> str:
    rows = []
    for phase in plan.phases:
        memory, rank = phase.memory, phase.rank
        passing = memory.peak - memory.state
        parts = [
            memory.weights,
            memory.gradients,
            memory.masters,
            memory.optimizer,
            memory.buffers,
            passing,
        ]
        rows.append(
            [
                f"{phase.first_step:,}", f"{rank.batch.micro_batch_size} x {rank.accumulation}",
                *map(bytes_text, parts), bytes_text(memory.peak), bytes_text(memory.host), _fits(phase),
            ]
        )  # fmt: skip
    header = ("from step", "rows", "weights", "gradients", "masters", "optimizer", "buffers",
              "in a step", "peak", "host", "")  # fmt: skip
    rank = plan.phases[0].rank
    return (
        f"Memory of a rank as the preset says: ZeRO {rank.zero.name}, checkpointing "
        f"{rank.model.activation_checkpointing}\n" + text_table(header, rows)
    )


def _fits(planned: "Planned") -> str:
    return "fits" if planned.fits else "DOES NOT FIT"


def _offers(plan: "Plan") -> str:
    """One line for each stage and checkpointing, one column for each micro-batch."""
    sizes = sorted({offer.rank.batch.micro_batch_size for offer in plan.offers})
    lines: dict[tuple[str, str], dict[int, str]] = {}
    hosts: dict[tuple[str, str], int] = {}
    for offer in plan.offers:
        key = (offer.rank.zero.name, offer.rank.model.activation_checkpointing)
        cell = bytes_text(offer.needed) + ("" if offer.fits else " !")
        lines.setdefault(key, {})[offer.rank.batch.micro_batch_size] = cell
        hosts[key] = max(hosts.get(key, 0), offer.memory.host)
    rows = [
        [*key, *(cells.get(size, "-") for size in sizes), bytes_text(hosts[key]) if hosts[key] else "-"]
        for key, cells in lines.items()
    ]  # fmt: skip
    length = plan.offers[0].rank.batch.sequence_length
    header = ["ZeRO", "checkpointing", *(f"{size} rows" for size in sizes), "host"]
    return (
        f"Memory of a rank in other settings, rows of {length}, by micro-batch; ! does not fit\n"
        + text_table(header, rows)
    )


def _advice(plan: "Plan") -> str:
    if plan.best is None:
        return (
            "Advice: nothing of this fits. Take more ranks with ZeRO 3, a smaller micro-batch, or devices with "
            "more memory."
        )
    rank = plan.best.rank
    least = (
        "least is computed twice, and exchanged" if plan.speed is None else "a step is the shortest"
    )
    return (
        f"Advice for rows of {rank.batch.sequence_length}: ZeRO {rank.zero.name}, "
        f"micro_batch_size={rank.batch.micro_batch_size}, "
        f"model.activation_checkpointing={rank.model.activation_checkpointing}: "
        f"{bytes_text(plan.best.needed)}. Of what fits, with it {least} "
        f"({bytes_text(exchange_of(rank).total)} sent by a rank in a step)."
    )


def _time(plan: "Plan") -> str:
    links = plan.machine.links
    assumed = (
        f"links {bytes_text(links.link)}/s a rank, {bytes_text(links.node_link)}/s a node of "
        f"{links.ranks_per_node}, memory {bytes_text(plan.machine.memory_per_second)}/s"
    )
    if plan.speed is None:
        return (
            f"Time: not known. Give --mfu (0.4 is a fair guess on GPUs), --step-seconds, or --measured-run. "
            f"Assumed: {assumed}."
        )
    rows, hidden, exposed = [], 0.0, 0.0
    for phase in plan.phases:
        time = phase.time
        assert time is not None
        hidden, exposed = (
            hidden + time.hidden * phase.num_steps,
            exposed + time.exposed * phase.num_steps,
        )
        rows.append(
            [
                f"{phase.first_step:,}", f"{phase.num_steps:,}", f"{time.compute:.4g} s",
                f"{time.exchange:.4g} s", f"{time.update:.4g} s", f"{time.hidden:.4g} to {time.exposed:.4g} s",
                f"{phase.num_tokens / time.exposed:,.0f} to {phase.num_tokens / time.hidden:,.0f}",
            ]
        )  # fmt: skip
    header = ("from step", "steps", "computing", "exchange", "update", "a step", "tokens/s")
    hours = [seconds * plan.num_ranks / 3600 for seconds in (hidden, exposed)]
    return (
        f"Time: {plan.speed / 1e12:.4g} TFLOP/s a rank ({plan.speed_from}); {assumed}\n"
        + text_table(header, rows)
        + f"\nThe whole run: {hidden / DAY:.3g} to {exposed / DAY:.3g} days, {hours[0]:,.0f} to "
        f"{hours[1]:,.0f} device hours; the first if all of the exchange hides behind the "
        "computing, the second if none does. "
        "Without evaluations, saves and stops."
    )


def _disk(plan: "Plan") -> str:
    """Masters, the optimizer's state and hf/, in fp32."""
    run, parameters = plan.run, parameters_of(plan.run.model, plan.vocab_size)
    one = 4 * (2 * parameters.total + optimizer_numbers(parameters, run.optim))
    kept = run.keep_checkpoints + 1
    for_ever = run.steps // run.keep_every if run.keep_every else 0
    return (
        f"Disk: {bytes_text(one)} a checkpoint, {bytes_text(one * (kept + for_ever))} for the "
        f"{run.keep_checkpoints} that are kept, the one being written"
        + (f", and {for_ever:,} that are never deleted" if for_ever else "")
    )
