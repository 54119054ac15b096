"""The parts of `cloze doctor --cluster` that need no machines: places, schedules, verdicts, GPUs, disks."""

import itertools
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, environment

from launcher.cluster_board import Address, Board, clock_offset, get, put, why_not_reached
from launcher.cluster_facts import LIMITS, Asked, Facts, try_disk
from launcher.cluster_gpus import Gpu, judge_gpus, read_gpus
from launcher.cluster_group import Group, Member
from launcher.cluster_judge import Examined, judge
from launcher.cluster_links import Measured, judge_ports, judge_speeds, judge_sums, pair_rounds
from launcher.cluster_place import Place, host_names, read_place, rendezvous_port, srun_command
from launcher.cluster_slurm import SlurmJob, judge_job, lead_seconds, parse_job

STEP = {
    "SLURM_JOB_ID": "40007", "SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "gpu[08-10]",
    "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2",
}  # fmt: skip


def test_names_of_hosts() -> None:
    assert host_names("login") == ["login"]
    assert host_names("gpu[08-10],b") == ["gpu08", "gpu09", "gpu10", "b"]
    assert host_names("r[1-2]n[1,5-6]-ib") == [
        f"r{rack}n{node}-ib" for rack in (1, 2) for node in (1, 5, 6)
    ]


def test_who_a_task_is() -> None:
    names = ("gpu08", "gpu09", "gpu10")
    assert read_place(STEP) == Place(2, 3, names, "gpu08", 20007, "40007-3", "slurm")
    with pytest.raises(ValueError, match="6 tasks on 3 nodes: --cluster takes one on each"):
        read_place({**STEP, "SLURM_STEP_NUM_TASKS": "6"})
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    assert read_place(by_hand)[:5] == (1, 2, ("task 0", "task 1"), "a", 29500)
    by_torchrun = {**by_hand, "TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": "1"}
    assert read_place(by_torchrun).port == 29501  # torchrun itself has 29500
    with pytest.raises(ValueError, match="4 tasks on this machine"):
        read_place({**by_torchrun, "LOCAL_WORLD_SIZE": "4"})
    with pytest.raises(ValueError, match="has RANK but not MASTER_PORT"):
        read_place({key: by_hand[key] for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR")})
    assert read_place({}).size == 1


def test_in_an_allocation_it_starts_itself_on_every_node() -> None:
    shell = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "4"}
    command = srun_command(shell, ["cloze"])
    assert command is not None and command[:2] == ["srun", "--nodes=2"] and command[-1] == "cloze"
    assert "--cpus-per-task=4" in command
    interactive = {**shell, "SLURM_STEP_ID": "4294967290"}
    assert srun_command(interactive, ["cloze"]) == command
    assert srun_command(STEP, ["cloze"]) is None and srun_command({}, ["cloze"]) is None


def test_the_scripts_agree_on_port_and_signal() -> None:
    """slurm/train.sbatch has the numbers, too: bash computes the one, doctor.sbatch repeats the other."""
    train, doctor = ((ROOT / "slurm" / f"{n}.sbatch").read_text() for n in ("train", "doctor"))
    (line,) = re.findall(r"^port=[^#]*", train, re.MULTILINE)
    for job in (1, 39999, 40000, 12345678):
        told = subprocess.run(
            ["bash", "-c", f"{line}; echo $port"], env={"SLURM_JOB_ID": str(job)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert int(told.stdout) == rendezvous_port(job)
    (signal,) = re.findall(r"^#SBATCH --signal=.*", train, re.MULTILINE)
    assert signal in doctor.splitlines()


def test_a_board_tells_what_was_put_there_and_when() -> None:
    with Board(0) as board:
        place = Address("127.0.0.1", board.port)
        put(place, "a", [1, None])
        assert get(place, "a", 5) == [1, None]
        with pytest.raises(TimeoutError, match="b was not told"):
            get(place, "b", 0.2)
        assert abs(clock_offset(place)) < 1
        assert why_not_reached(place) is None
        with pytest.raises(OSError, match="in use"):
            Board(board.port)
    said = why_not_reached(place)
    assert said is not None and said.startswith("refused")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 40])
def test_every_machine_meets_every_other_once(count: int) -> None:
    rounds = pair_rounds(list(range(count)))
    for pairs in rounds:
        ranks = list(itertools.chain(*pairs))
        assert len(ranks) == len(set(ranks)) >= count - 1  # nobody is in two pairs, one may rest
    pairs = list(itertools.chain(*rounds))
    assert len(pairs) == len(set(pairs))
    if count <= 32:
        assert set(pairs) == set(itertools.combinations(range(count), 2))
    else:
        assert len(rounds) == 31


def measured(speeds: dict[tuple[int, int], float]) -> list[Measured]:
    return [
        Measured(Group(f"{a}-{b}", (a, b), "gloo"), {r: {"bytes_per_second": s} for r in (a, b)})
        for (a, b), s in speeds.items()
    ]


def all_pairs(count: int, speed: float = 1e9) -> dict[tuple[int, int], float]:
    return dict.fromkeys(itertools.combinations(range(count), 2), speed)


HOSTS = {rank: f"host{rank}" for rank in range(16)}


@pytest.mark.parametrize("count", [3, 4, 8])
def test_a_slow_machine_is_named(count: int) -> None:
    """Also of three, where two of three links are slow."""
    speeds = {pair: 2e8 if 1 in pair else s for pair, s in all_pairs(count).items()}
    (found,) = judge_speeds(measured(speeds), HOSTS)
    assert (found.verdict, found.of) == ("PROBLEM", "host1")
    assert found.found == "at most 200.0 MB/s with any other; usual are 1.0 GB/s"


def test_a_slow_link_between_fast_machines_is_named() -> None:
    (found,) = judge_speeds(measured(all_pairs(4) | {(1, 3): 4e8}), HOSTS)
    assert (found.verdict, found.of) == ("PROBLEM", "host1 - host3")


def test_a_link_that_was_slow_once_is_not_slow() -> None:
    """Nothing makes a link faster than it is: the second measurement, alone, is right."""
    again = [*measured(all_pairs(3) | {(0, 1): 1e8}), *measured({(0, 1): 9e8})]
    assert [found.verdict for found in judge_speeds(again, HOSTS)] == ["OK"]
    assert [f.verdict for f in judge_speeds(measured(all_pairs(3, 6e8)), HOSTS)] == ["OK"]


def test_a_slow_network_of_two_is_a_warning() -> None:
    (found,) = judge_speeds(measured({(0, 1): 9e6}), HOSTS)
    assert found.verdict == "WARNING" and "Ethernet" in found.advice


def test_blocked_ports_wrong_sums_and_hangs_are_named() -> None:
    def of(pair: tuple[int, int], first: dict, second: dict) -> Measured:
        return Measured(Group("g", pair, "gloo"), dict(zip(pair, (first, second), strict=True)))

    blocked = [of((0, 1), {"unreached": "refused"}, {"unreached": None}), *measured({(0, 2): 1e9})]
    (found,) = judge_ports(blocked, HOSTS)
    assert (found.verdict, found.of) == ("PROBLEM", "host1")
    assert found.found == "not reached by host0: refused"
    nobody = [
        of((0, 1), {"unreached": "no answer"}, {"unreached": None}),
        of((1, 2), {"unreached": None}, {"unreached": "no answer"}),
    ]
    assert judge_ports(nobody, HOSTS)[0].found == "not reached by any other: no answer"
    wrong = of((0, 1), {"bytes_per_second": 1e9, "num_wrong": 3}, {"bytes_per_second": 1e9})
    (found,) = judge_sums([wrong], HOSTS)
    assert (found.verdict, found.of) == ("PROBLEM", "host0 - host1") and found.found[0] == "3"
    (found,) = judge_sums([of((0, 1), {"error": "it hung"}, {"error": "it hung"})], HOSTS)
    assert found.found == "fails: host0: it hung; host1: it hung"


def test_wrong_sums_are_counted() -> None:
    """Two real processes; one of them damages what it sends, now and then."""
    wrong = """
import torch.distributed as dist
from launcher import cluster_worker
honest = dist.all_reduce
def damaged(values, *rest, **more):
    if values.dtype.itemsize == 4 and values.numel() == 65536:
        values[7] += 1
    return honest(values, *rest, **more)
dist.all_reduce = damaged
cluster_worker.main(0)
"""
    workers = [
        subprocess.Popen(
            [sys.executable, *how], cwd=ROOT, env=environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for how in (["-m", "launcher.cluster_worker", "0"], ["-c", wrong])
    ]  # fmt: skip

    def say(rank: int, port: int) -> None:
        group = {
            "rank": rank, "size": 2, "backend": "gloo", "host": "127.0.0.1", "port": port, "seconds": 60,
        }  # fmt: skip
        workers[rank].stdin.write(json.dumps(group) + "\n")  # pyright: ignore[reportOptionalMemberAccess]
        workers[rank].stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]

    def hear(rank: int) -> dict:
        return json.loads(workers[rank].stdout.readline())  # pyright: ignore[reportOptionalMemberAccess]

    try:
        assert [hear(rank)["cuda_devices"] >= 0 for rank in range(2)] == [True, True]
        say(0, 0)
        say(1, hear(0)["port"])
        told = [hear(rank) for rank in range(2)]
    finally:
        for worker in workers:
            worker.communicate()
    assert told[0] == told[1] and told[0]["bytes_per_second"] > 0
    assert told[0]["num_wrong"] == 3  # one in each repetition, with that many values


SMI = """#!/bin/bash
# Stands for nvidia-smi of an old or a new driver.
case "$DRIVER $*" in "old "*clocks_event*) echo 'Field "x" is not a valid field to query.'; exit 2;; esac
cat <<'END'
0, NVIDIA H100 80GB HBM3, 535.1, 81559, 4, 0, Not Active, Not Active, Not Active, Not Active
1, NVIDIA H100 80GB HBM3, 535.1, 81559, 40960, 2, Not Active, Active, Not Active, Not Active
2, NVIDIA T4, 535.1, 15360, 4, [N/A], Not Active, Not Active, Not Active, Not Active
END
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return program


@pytest.mark.parametrize("driver", ["new", "old"])
def test_gpus_that_are_ill(smi: Path, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVER", driver)
    gpus = read_gpus()
    assert [gpu.number for gpu in gpus] == [0, 1, 2] and gpus[2].ecc_errors is None
    assert judge_gpus("host1", gpus[::2], 2, None) == []
    findings = judge_gpus("host1", gpus, 3, 3)
    assert {found.of for found in findings} == {"host1, GPU 1"}
    assert [found.found for found in findings] == [
        "2 ECC errors that could not be corrected",
        "slowed down: hw_thermal_slowdown",
        "40,960 of 81,559 MB are in use",
    ]
    (found,) = judge_gpus("host1", gpus[::2], 1, 2)
    assert found.found == "torch sees 1, nvidia-smi 2, Slurm gave 2"
    (found,) = judge_gpus("host1", [], 0, 8)
    assert found.verdict == "PROBLEM"


def test_a_gpu_that_is_lost(smi: Path) -> None:
    smi.write_text("#!/bin/sh\necho 'Unable to determine the device handle for GPU'; exit 9\n")
    with pytest.raises(OSError, match="nvidia-smi fails: Unable to determine"):
        read_gpus()


def test_a_disk_that_hangs_is_given_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="no answer within 0 s: the disk, or its server, hangs"):
        Asked(lambda: (tmp_path / "fifo").read_text()).answer(0.3)


def test_a_disk_is_measured_and_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "slurm"
    disk = try_disk(folder, 1 << 20)
    assert disk.problem is None and disk.write_bytes_per_second > 0 and disk.free_bytes > 0
    assert disk.made == (str(folder.parent), str(folder)) and not list(folder.iterdir())
    (tmp_path / "file").write_text("")
    assert try_disk(tmp_path / "file" / "run", 1).problem == "Not a directory"


SHOWN = "JobId=7 JobName=x\n   RunTime=00:00:00 TimeLimit=1-02:03:04 TimeMin=N/A\n"
SCRIPT = "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --signal=B:USR1@300 # to save\nsrun --signal=KILL@1 x\n"


def test_when_slurm_warns_a_job() -> None:
    """As for sbatch: its command line counts most, then the variable, then the script."""
    assert parse_job(SHOWN, SCRIPT, {}) == SlurmJob("B:USR1@300", 93784)
    variable = {"SBATCH_SIGNAL": "USR2@40"}
    assert parse_job(SHOWN, SCRIPT, variable).signal == "USR2@40"
    line = "   SubmitLine=sbatch --signal B:TERM@9 x.sbatch\n"
    assert parse_job(SHOWN + line, SCRIPT, variable).signal == "B:TERM@9"
    assert parse_job("TimeLimit=UNLIMITED", "", {}) == SlurmJob(None, None)
    assert lead_seconds("B:USR1@300") == 300 and lead_seconds("USR1") == 60


def test_a_lead_that_is_too_short_or_too_long() -> None:
    verdicts = {
        (lead, limit): [found.verdict for found in judge_job(SlurmJob(lead, limit), 100)]
        for lead, limit in (("B:USR1@100", 900), ("B:USR1@99", 900), ("B:USR1@500", 900), (None, 60))
    }  # fmt: skip
    assert list(verdicts.values()) == [["OK"], ["PROBLEM"], ["OK", "WARNING"], ["OK"]]


UNLIMITED = dict.fromkeys(LIMITS)
EIGHT_GPUS = Member(2, "host2", "a", 1, 8)


def facts_of(rank: int, tmp_path: Path, **changes: object) -> Facts:
    disk = try_disk(tmp_path, 1)
    known = Facts(
        member=Member(rank, f"host{rank}", "10.0.0.1", 1, 0), worker_problem=None,
        packages=["torch==2.13.0", "numpy==2.4"], kernel="6.1",
        code="c" * 32, preset="p" * 32, dataset="d" * 32,
        preset_problem=None, dataset_problem=None, run=disk, temporary=disk, shared_memory_bytes=1 << 30,
        limits=UNLIMITED, has_infiniband=True, variables={}, interfaces=["lo", "eth0"], own_name_problem=None,
        gpus=[], gpu_problem=None, num_given_gpus=None,
    )  # fmt: skip
    return known._replace(**changes)


def examined(facts: dict[int, Facts], **changes: object) -> Examined:
    hosts = {rank: f"host{rank}" for rank in facts}
    place = Place(0, len(facts), tuple(hosts.values()), "host0", 20007, "7-0", "slurm")
    found = Examined(
        place, hosts, facts, {}, [], dict.fromkeys(facts, 0.0), {}, measured(all_pairs(len(facts))),
        None, None,
    )  # fmt: skip
    return found._replace(**changes)


ILL = {  # what one of four machines says -> (check, words of what is found)
    "packages": ({"packages": ["torch==2.12.0", "numpy==2.4"]}, "torch 2.12.0 (others 2.13.0)"),
    "kernel": ({"kernel": "5.4"}, "Linux 5.4 (others 6.1)"),
    "code": ({"code": "e" * 32}, "code eeeeeeee (others cccccccc)"),
    "preset": ({"preset_problem": "p.yaml is not there"}, "p.yaml is not there"),
    "dataset": ({"dataset_problem": "d is not a folder"}, "d is not a folder"),
    "variables": ({"variables": {"NCCL_DEBUG": "INFO"}}, "NCCL_DEBUG INFO (others none)"),
    "shared memory": ({"shared_memory_bytes": 64_000_000, "member": EIGHT_GPUS}, "64.0 MB for 8 GPUs"),
    "interface": ({"own_name_problem": "host2 leads to 127.0.1.1"}, "host2 leads to 127.0.1.1"),
    "ulimits": ({"limits": {**UNLIMITED, "open files": 64}}, "64 open files"),
    "GPUs": ({"gpus": [Gpu(0, "A", "1", 9, 0, 9, ())], "member": EIGHT_GPUS}, "9 ECC errors"),
}  # fmt: skip


@pytest.mark.parametrize("check", ILL)
def test_the_one_that_is_ill_is_named(check: str, tmp_path: Path) -> None:
    facts = {rank: facts_of(rank, tmp_path) for rank in range(4)}
    assert {found.verdict for found in judge(examined(facts))} == {"OK"}
    change, words = ILL[check]
    facts[2] = facts_of(2, tmp_path, **change)
    ill = [found for found in judge(examined(facts)) if found.verdict != "OK"]
    assert {found.check for found in ill} == {check}
    assert all(found.of.startswith("host2") and found.advice for found in ill)
    assert words in ill[0].found


def test_interfaces_that_are_not_there(tmp_path: Path) -> None:
    variables = {"GLOO_SOCKET_IFNAME": "ib0"}
    facts = {rank: facts_of(rank, tmp_path, variables=variables) for rank in range(2)}
    (ill,) = (found for found in judge(examined(facts)) if found.verdict != "OK")
    assert (ill.check, ill.of) == ("interface", "2 machines")
    assert ill.found == "GLOO_SOCKET_IFNAME names ib0; there are lo, eth0"


def test_clocks_and_machines_that_are_lost(tmp_path: Path) -> None:
    facts = {rank: facts_of(rank, tmp_path) for rank in range(3)}
    found = judge(examined(facts, clocks={0: 0.0, 1: 61.5, 2: -0.4}, lost=[2]))
    ill = {(one.check, one.of): one.found for one in found if one.verdict == "PROBLEM"}
    assert ill == {
        ("clocks", "host1"): "61.5 s ahead of the others",
        ("meeting", "host2"): "left in the middle of this",
    }
