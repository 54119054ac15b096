"""What all machines have told in, findings out: who came, whether they are alike, what is wrong with which."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from statistics import median_high, median_low
from typing import NamedTuple

from data.diagnosis import Finding, Verdict
from launcher import cluster_machine
from launcher.cluster_facts import Facts
from launcher.cluster_gpus import judge_gpus
from launcher.cluster_links import Measured, judge_ports, judge_speeds, judge_sums, machines
from launcher.cluster_machine import Illness, Needs
from launcher.cluster_place import Place
from launcher.cluster_slurm import SlurmJob, judge_job
from launcher.tables import bytes_text

CLOCK_SECONDS = 5.0  # that clocks may differ
MOST_NAMED = 4  # differing packages of one machine
SLOW_DISK_SHARE, SLOW_DISK_SECONDS = 0.25, 60.0  # of the usual; for its part of a checkpoint


class Examined(NamedTuple):
    """All that was found out. Machines go by the ranks of their tasks."""

    place: Place
    hosts: dict[int, str]
    facts: dict[int, Facts]  # of all that were heard of
    not_joined: dict[int, str]  # that did not reach the first one, or were not heard of: why
    lost: list[int]  # not heard of any more, in the middle
    clocks: dict[int, float]  # seconds ahead of the first one's
    unseen: dict[int, list[int]]  # rank -> those whose files it does not see
    measured: list[Measured]
    needs: Needs | None  # None: the preset or the dataset cannot be read
    job: SlurmJob | str | None  # str: why Slurm could not be asked


class Trait(NamedTuple):
    """What all machines should have in common."""

    name: str
    values_of: Callable[[Facts], Mapping[str, str]]
    advice: str
    verdict: Verdict = "PROBLEM"
    problem_of: Callable[[Facts], str | None] = lambda facts: None


def _packages(facts: Facts) -> dict[str, str]:
    """Name -> version, or versions where it is found twice."""
    versions: dict[str, list[str]] = {}
    for line in facts.packages:
        name, _, version = line.partition("==")
        versions.setdefault(name, []).append(version)
    return {name: " and ".join(told) for name, told in versions.items()}


TRAITS = (
    Trait(
        "packages",
        _packages,
        "Ranks with other versions compute other numbers, or do not understand each other. Use one environment "
        "on a shared filesystem (CLOZE_VENV in slurm/cluster.env); look at PYTHONPATH and ~/.local, too.",
    ),
    Trait(
        "kernel",
        lambda facts: {"Linux": facts.kernel},
        "Not updated together? Drivers and filesystems may differ, too.",
        "WARNING",
    ),
    Trait(
        "code",
        lambda facts: {"code": facts.code[:8]},
        "Ranks would not run the same program. Start from one folder that all machines mount.",
    ),
    Trait(
        "preset",
        lambda facts: {"preset": facts.preset[:8]},
        "Every machine reads the preset and DeepSpeed's JSON itself: put them where all see the same.",
        problem_of=lambda facts: facts.preset_problem,
    ),
    Trait(
        "dataset",
        lambda facts: {"dataset": facts.dataset[:8]},
        "Every machine reads the dataset itself: put it where all see the same.",
        problem_of=lambda facts: facts.dataset_problem,
    ),
    Trait(
        "variables",
        lambda facts: facts.variables,
        "Set them in slurm/cluster.env, which every process gets, not in a machine's own profile.",
        "WARNING",
    ),
)


def judge(found: Examined) -> list[Finding]:
    """The whole table, in the order in which it is to be read."""
    facts, needs = found.facts, found.needs
    num_ranks = sum(max(1, one.member.num_gpus) for one in facts.values())
    findings = [*_meeting(found), *_alike(found), *_clocks(found), *_run_folder(found)]
    free = [one.run.free_bytes for one in facts.values() if not one.run.problem]
    if needs and free:
        room = cluster_machine.room_text(needs, min(free))
        findings += _each(found, "disk", lambda one: cluster_machine.disk(one, needs), room)
    findings += _each(found, "temporary folder", cluster_machine.temporary_folder, "has room")
    findings += _each(
        found, "shared memory", lambda one: cluster_machine.shared_memory(one, needs), "suffices"
    )
    findings += _each(
        found, "ulimits", lambda one: cluster_machine.ulimits(one, needs, num_ranks), "suffice"
    )
    findings += _gpus(found)
    if len(facts) > 1:
        findings += _each(
            found, "interface", cluster_machine.network_interface, "not the loopback one"
        )
        findings += judge_ports(found.measured, found.hosts)
        findings += judge_speeds(found.measured, found.hosts)
    findings += judge_sums(found.measured, found.hosts)
    findings += _time_limit(found)
    return findings


def _meeting(found: Examined) -> list[Finding]:
    """Who did not come, and why; a machine without facts has not even left a note."""
    hosts, where = found.hosts, f"{found.place.first_host}:{found.place.port}"
    findings = []
    for rank, why in sorted(found.not_joined.items()):
        if rank == 0:
            advice = (
                "The processes of a run meet at that port. Another job, or what is left of one, has it: "
                "`ss -ltnp` there names it. A run by torchrun takes another by --rdzv-endpoint."
            )
            what = f"port {found.place.port}: {why}"
        elif rank in found.facts:
            advice = (
                f"The processes of a run meet there: a firewall on {hosts[0]}, or on the way, has to let this "
                "port through. (What is said here of this machine came by the run's folder.)"
            )
            what = f"cannot reach {where}: {why}"
        else:
            advice = (
                f"It came neither to {where} nor into the run's folder. Is it up, did its task start? Is the "
                "port blocked, and the folder not shared? Look at it, or leave it out (--exclude)."
            )
            what = why
        findings.append(Finding("meeting", hosts[rank], what, "PROBLEM", advice))
    advice = "Its task has ended, or its network: see the job's log, and `dmesg` there."
    findings += [
        Finding("meeting", hosts[rank], "left in the middle of this", "PROBLEM", advice)
        for rank in found.lost
    ]
    if findings:
        return findings
    if len(hosts) == 1:
        return [Finding("meeting", _all(found), hosts[0])]
    names = f"{hosts[0]} to {hosts[max(hosts)]}, at {where}"
    return [Finding("meeting", _all(found), names)]


def _all(found: Examined) -> str:
    return machines(len(found.facts))


def _alike(found: Examined) -> list[Finding]:
    """A Finding for each trait of a machine that is not as on most others; else one for all."""
    findings, common = [], []
    for trait in TRAITS:
        odd, text = _compare(found, trait)
        findings += odd
        common.append(text)
    same = "the same" if len(found.facts) > 1 else "this"
    return findings or [Finding("software", _all(found), f"{same}: {', '.join(common)}")]


def _compare(found: Examined, trait: Trait) -> tuple[list[Finding], str]:
    """What differs, and what is common, in few words."""
    findings, values = [], {}
    for rank, facts in found.facts.items():
        if problem := trait.problem_of(facts):
            findings.append(
                Finding(trait.name, found.hosts[rank], problem, "PROBLEM", trait.advice)
            )
        else:
            values[rank] = trait.values_of(facts)
    names = sorted({name for told in values.values() for name in told})
    usual = {
        name: Counter(told.get(name, "none") for told in values.values()).most_common(1)[0][0]
        for name in names
    }
    for rank, told in values.items():
        odd = [name for name in names if told.get(name, "none") != usual[name]]
        said = [f"{n} {told.get(n, 'none')} (others {usual[n]})" for n in odd[:MOST_NAMED]]
        if odd:
            said += [f"{len(odd) - MOST_NAMED} more"] if len(odd) > MOST_NAMED else []
            findings.append(
                Finding(trait.name, found.hosts[rank], ", ".join(said), trait.verdict, trait.advice)
            )
    if len(names) == 1:
        return findings, f"{names[0]} {usual[names[0]]}"
    return findings, f"{len(names)} {trait.name}"


def _each(
    found: Examined, check: str, look: Callable[[Facts], Collection[Illness]], well: str
) -> list[Finding]:
    """What `look` finds on machines, those with the same in one Finding; `well` where it finds nothing."""
    ill: dict[Illness, list[int]] = {}
    for rank, facts in found.facts.items():
        for illness in look(facts):
            ill.setdefault(illness, []).append(rank)
    if not ill:
        return [Finding(check, _all(found), well)]
    return [
        Finding(check, _named(ranks, found), illness.found, illness.verdict, illness.advice)
        for illness, ranks in ill.items()
    ]


def _named(ranks: list[int], found: Examined) -> str:
    if len(ranks) == len(found.facts):
        return _all(found)
    return ", ".join(found.hosts[rank] for rank in ranks)


def _clocks(found: Examined) -> list[Finding]:
    if len(found.clocks) < 2:
        return []
    middle = median_low(found.clocks.values())
    ahead = {rank: seconds - middle for rank, seconds in found.clocks.items()}
    advice = (
        "Slurm refuses, and filesystems misjudge, what comes from another time. Its time service does not run: "
        "`chronyc tracking`, `timedatectl`."
    )
    findings = [
        Finding(
            "clocks", found.hosts[rank],
            f"{abs(seconds):,.1f} s {'ahead of' if seconds > 0 else 'behind'} the others", "PROBLEM", advice,
        )
        for rank, seconds in ahead.items() if abs(seconds) > CLOCK_SECONDS
    ]  # fmt: skip
    most = 1000 * max(map(abs, ahead.values()))
    return findings or [Finding("clocks", machines(len(ahead)), f"within {most:,.0f} ms")]


def _run_folder(found: Examined) -> list[Finding]:
    """Written by every machine, and what one writes is seen by the others; how fast."""
    advice = (
        "Every rank writes its part of a checkpoint there: on a filesystem that all machines share."
    )

    def look(facts: Facts) -> list[Illness]:
        if facts.preset_problem:
            return []
        if facts.run.problem:
            return [Illness(f"{facts.run.folder}: {facts.run.problem}", advice)]
        unseen = [found.hosts[rank] for rank in found.unseen.get(facts.member.rank, [])]
        return [Illness(f"what {', '.join(unseen)} wrote is not seen", advice)] if unseen else []

    speeds = {
        rank: facts.run.write_bytes_per_second
        for rank, facts in found.facts.items()
        if facts.run.write_bytes_per_second
    }
    if not speeds:
        return _each(found, "run folder", look, "is not known")
    slowest, usual = min(speeds, key=lambda rank: speeds[rank]), median_high(speeds.values())
    well = f"{bytes_text(speeds[slowest])}/s on the slowest ({found.hosts[slowest]}), all at once"
    findings = _each(found, "run folder", look, well)
    for rank, speed in speeds.items() if found.needs else ():
        seconds = found.needs.room.one_bytes / len(found.facts) / speed if found.needs else 0
        if speed < SLOW_DISK_SHARE * usual and seconds > SLOW_DISK_SECONDS:
            what = f"{bytes_text(speed)}/s; usual are {bytes_text(usual)}/s"
            wait = (
                f"Its part of a checkpoint would take {seconds:,.0f} s, and all others wait for it."
            )
            findings.append(Finding("run folder", found.hosts[rank], what, "WARNING", wait))
    return findings


def _gpus(found: Examined) -> list[Finding]:
    """None where no machine has any, and none was asked for."""
    facts = found.facts
    advice = "A process of a run would fail there, too: `nvidia-smi`, `dmesg`. Leave the node out."
    findings = []
    for rank, one in facts.items():
        for check, problem in (("GPUs", one.gpu_problem), ("torch", one.worker_problem)):
            if problem:
                findings.append(Finding(check, found.hosts[rank], problem, "PROBLEM", advice))
        if not one.gpu_problem and not one.worker_problem:
            numbers = one.member.num_gpus, one.num_given_gpus
            findings += judge_gpus(found.hosts[rank], one.gpus, *numbers)
    odd, common = _compare(found, GPU_TRAIT)
    if findings or odd or not any(one.gpus for one in facts.values()):
        return findings + odd
    return [Finding("GPUs", _all(found), common)]


def _gpu_names(facts: Facts) -> dict[str, str]:
    names = Counter(f"{gpu.name}, driver {gpu.driver}" for gpu in facts.gpus)
    return {"on each": "; ".join(f"{number} x {name}" for name, number in sorted(names.items()))}


GPU_TRAIT = Trait(
    "GPUs", _gpu_names, "The slower ones are waited for, and drivers may not fit.", "WARNING"
)


def _time_limit(found: Examined) -> list[Finding]:
    if isinstance(found.job, str):
        return [Finding("time limit", "this job", f"was not looked at: {found.job}")]
    if found.job is None or found.needs is None:
        return []
    return judge_job(found.job, found.needs.signal_seconds)
