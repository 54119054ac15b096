"""Machines in, who is measured with whom out; what was measured in, which machine or link is slow or broken.

A machine is slow when even its fastest pair has less than half of the usual speed. The usual is the median of
each machine's fastest pair, so that one slow machine of three does not look like the rule. What is slow between
two machines that are fast with others is the way between them.
"""

from collections.abc import Collection, Mapping
from statistics import median_high
from typing import Any, NamedTuple

from data.diagnosis import Finding
from launcher.cluster_group import Group
from launcher.tables import bytes_text

MOST_ROUNDS = 31  # every pair of up to 32 machines; of more, each with 31 others
SLOW_SHARE = 0.5  # of what is usual
SLOW_BYTES_PER_SECOND = 50e6  # by itself: not half of Ethernet with 1 Gbit/s

Pair = tuple[int, int]


class Measured(NamedTuple):
    """What all machines of a group have said of it. results: rank -> that of launcher.cluster_group."""

    group: Group
    results: dict[int, dict[str, Any]]

    @property
    def errors(self) -> dict[int, str]:
        return {rank: said["error"] for rank, said in self.results.items() if "error" in said}

    @property
    def num_wrong(self) -> int:
        return max((said.get("num_wrong", 0) for said in self.results.values()), default=0)

    @property
    def speed(self) -> float | None:
        """Bytes a second; None where it was not measured on every machine."""
        speeds = [said.get("bytes_per_second") for said in self.results.values()]
        known = [speed for speed in speeds if speed is not None]
        return min(known) if known and len(known) == len(self.group.ranks) else None


def machines(number: int) -> str:
    """Whose a Finding is that is of all."""
    return f"{number} machines" if number > 1 else "this machine"


def pair_rounds(ranks: list[int]) -> list[list[Pair]]:
    """Rounds in which every machine is in at most one pair; no pair comes twice.

    The circle method of tournaments: one stays in place while the others move on by one.
    """
    circle: list[int | None] = [*ranks, *([None] if len(ranks) % 2 else [])]
    rounds = []
    for _ in range(min(len(circle) - 1, MOST_ROUNDS)):
        halves = zip(circle, reversed(circle), strict=True)
        pairs = [pair for pair, _ in zip(halves, range(len(circle) // 2), strict=False)]
        rounds.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def pair_speeds(measured: Collection[Measured]) -> dict[Pair, float]:
    """Of pairs that were measured twice, the faster time: nothing makes a link look faster than it is."""
    speeds: dict[Pair, float] = {}
    for one in measured:
        if len(one.group.ranks) == 2 and (speed := one.speed) is not None:
            first, second = one.group.ranks
            speeds[first, second] = max(speed, speeds.get((first, second), 0.0))
    return speeds


def usual_speed(speeds: Mapping[Pair, float]) -> float:
    """The median over machines of each one's fastest pair."""
    return median_high(fastest_of_each(speeds).values())


def fastest_of_each(speeds: Mapping[Pair, float]) -> dict[int, float]:
    fastest: dict[int, float] = {}
    for pair, speed in speeds.items():
        for rank in pair:
            fastest[rank] = max(speed, fastest.get(rank, 0.0))
    return fastest


def slow_pairs(speeds: Mapping[Pair, float]) -> list[Pair]:
    """The slowest first."""
    if not speeds:
        return []
    limit = SLOW_SHARE * usual_speed(speeds)
    return sorted((p for p in speeds if speeds[p] < limit), key=lambda pair: speeds[pair])


def judge_speeds(measured: Collection[Measured], hosts: Mapping[int, str]) -> list[Finding]:
    """One Finding where all links are alike; else one for each slow machine, and each other slow link."""
    speeds = pair_speeds(measured)
    if not speeds:
        return []
    usual, fastest = usual_speed(speeds), fastest_of_each(speeds)
    slow_hosts = {rank for rank, speed in fastest.items() if speed < SLOW_SHARE * usual}
    findings = [
        Finding(
            "links", hosts[rank],
            f"at most {bytes_text(fastest[rank])}/s with any other; usual are {bytes_text(usual)}/s",
            "PROBLEM",
            "All machines wait for the slowest one in every step. Its cable, its switch port or the speed that "
            "the two have agreed on (`ethtool`, `ibstat`), a full firewall or other traffic: tell the "
            "administrators, and leave it out meanwhile (--exclude).",
        )
        for rank in sorted(slow_hosts)
    ]  # fmt: skip
    findings += [
        Finding(
            "links", f"{hosts[first]} - {hosts[second]}",
            f"{bytes_text(speeds[first, second])}/s; usual are {bytes_text(usual)}/s", "PROBLEM",
            "Each of the two is faster with others: something on the way between them. Run on machines of one "
            "switch, or leave one of the two out.",
        )
        for first, second in slow_pairs(speeds)
        if not {first, second} & slow_hosts
    ]  # fmt: skip
    if findings:
        return findings
    slowest = min(speeds, key=lambda pair: speeds[pair])
    found = (
        f"all-reduce {bytes_text(speeds[slowest])}/s in the slowest of {len(speeds)} pairs "
        f"({' - '.join(hosts[rank] for rank in slowest)}), usual {bytes_text(usual)}/s"
    )
    if usual < SLOW_BYTES_PER_SECOND:
        advice = (
            "Not half of what Ethernet of 1 Gbit/s gives, everywhere: a step will mostly wait for the network. "
            "Is there a faster one, for GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME (slurm/cluster.env) to choose?"
        )
        return [Finding("links", machines(len(fastest)), found, "WARNING", advice)]
    return [Finding("links", machines(len(fastest)), found)]


def judge_ports(measured: Collection[Measured], hosts: Mapping[int, str]) -> list[Finding]:
    """Connections that could not be opened: named by the machine that is not reached, if by nobody."""
    blocked: dict[int, dict[int, str]] = {}  # not reached -> by whom, and why
    asked: dict[int, set[int]] = {}
    for one in measured:
        if len(one.group.ranks) != 2:
            continue
        for rank, said in one.results.items():
            (other,) = set(one.group.ranks) - {rank}
            asked.setdefault(other, set()).add(rank)
            if said.get("unreached"):
                blocked.setdefault(other, {})[rank] = said["unreached"]
    findings = []
    for rank, reasons in sorted(blocked.items()):
        by_all = len(reasons) == len(asked[rank]) > 1
        by = "any other" if by_all else " and ".join(hosts[other] for other in sorted(reasons))
        found = f"not reached by {by}: {'; '.join(sorted(set(reasons.values())))}"
        advice = (
            "Processes of a run connect from every machine to every other, at ports that the kernel chooses "
            "(`sysctl net.ipv4.ip_local_port_range`): firewalls between them have to let these through."
        )
        findings.append(Finding("ports", hosts[rank], found, "PROBLEM", advice))
    if findings or not asked:
        return findings
    return [Finding("ports", machines(len(asked)), "open from each to each")]


def judge_sums(measured: Collection[Measured], hosts: Mapping[int, str]) -> list[Finding]:
    """All-reduces that failed, or whose sums were wrong; and those of all machines at once."""
    findings = []
    for one in measured:
        of = " - ".join(hosts[rank] for rank in one.group.ranks)
        of = of if len(one.group.ranks) == 2 else machines(len(one.group.ranks))
        if one.errors:
            said = "; ".join(sorted({f"{hosts[rank]}: {why}" for rank, why in one.errors.items()}))
            advice = (
                "They can open connections to each other, but nothing comes through. Does gloo listen where "
                "the other looks (GLOO_SOCKET_IFNAME; NCCL_SOCKET_IFNAME), do large packets pass (MTU), and, "
                "with NCCL, do its own libraries load (NCCL_DEBUG=INFO)?"
            )
            findings.append(Finding("all-reduce", of, f"fails: {said}", "PROBLEM", advice))
        elif one.num_wrong:
            found = f"{one.num_wrong} values are not the sum of what was sent"
            advice = (
                "Something damages data on its way: memory, a GPU, a network card. Leave these out."
            )
            findings.append(Finding("all-reduce", of, found, "PROBLEM", advice))
        elif len(one.group.ranks) != 2 and (speed := one.speed) is not None:
            found = f"{one.group.backend}, sums are right, {bytes_text(speed)}/s"
            findings.append(Finding("all-reduce", of, found))
    return findings
