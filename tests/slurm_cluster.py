"""A real Slurm on this machine: a controller and nodes, each with a network, processes and a name of its own.

Needs root, iproute2 and Debian's munge, slurmctld, slurmd and slurm-client; `slurm_cluster` skips where they
are missing. Nothing listens outside the namespaces.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hosts import Hosts, hosts

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "setpriv", "ip")
CONFIGURATION = """
ClusterName=test
SlurmctldHost=host0({controller})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=10
KillWait=10
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
NodeName=host[1-{count}] CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=off
"""
CONTROLLER = """
setpriv --reuid=munge --regid=munge --clear-groups munged --foreground --key-file={folder}/munge/key \\
    --socket={folder}/munge/socket --pid-file={folder}/munge/pid --log-file={folder}/munge/log \\
    --seed-file={folder}/munge/seed &
until [ -S {folder}/munge/socket ]; do sleep 0.05; done
slurmctld -D -f {folder}/slurm.conf &
"""
NODE = "slurmd -D -N host{number} -f {folder}/slurm.conf &"
INIT = """
hostname host{number}
mount -t tmpfs tmpfs /dev/shm
{start}
while :; do wait -n || true; sleep 0.2; done
"""


class SlurmCluster:
    """host1 to host`count` are nodes, host0 is the controller, on which commands run."""

    def __init__(self, machines: Hosts, folder: Path, count: int) -> None:
        self.machines, self.folder, self.count = machines, folder, count
        self._inits: dict[int, subprocess.Popen[bytes]] = {}

    def up(self) -> None:
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir()
        for number in range(1, self.count + 1):
            (self.folder / "spool" / f"host{number}").mkdir()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for path in (key.parent, key):
            shutil.chown(path, "munge", "munge")
        configuration = CONFIGURATION.format(
            folder=self.folder, count=self.count, controller=self.machines.address(0)
        )
        (self.folder / "slurm.conf").write_text(configuration)
        # where cgroups cannot be detected slurmd does not start; none are used here
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self._start(0, CONTROLLER)
        for number in range(1, self.count + 1):
            self._start(number, NODE)
        self.wait_for(
            lambda: (
                self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()
                == ["idle"] * self.count
            ),
            "all nodes are idle",
        )

    def _start(self, number: int, start: str) -> None:
        script = INIT.format(number=number, start=start.format(folder=self.folder, number=number))
        command = [
            "ip", "netns", "exec", self.machines.spaces[number], "unshare", "--mount", "--uts", "--pid",
            "--fork", "--mount-proc", "--propagation", "private", "--kill-child=KILL", "bash", "-c", script,
        ]  # fmt: skip
        with (self.folder / f"init{number}.log").open("ab") as log:
            self._inits[number] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")},
            )  # fmt: skip

    def crash(self, number: int) -> None:
        """Power off."""
        self.machines.unplug(number)
        init = self._inits.pop(number)
        init.send_signal(signal.SIGKILL)
        init.wait()

    def boot(self, number: int) -> None:
        self.machines.mend(number)
        self._start(number, NODE)

    def run(self, *command: str, check: bool = True, **variables: str) -> str:
        """On the controller; what it printed."""
        return self.run_on(0, *command, check=check, **variables)

    def run_on(self, number: int, *command: str, check: bool = True, **variables: str) -> str:
        """On a node, among its processes and mounts."""
        parent = self._inits[number].pid
        child = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0]
        result = subprocess.run(
            ["nsenter", "-t", child, "-m", "-u", "-n", "-p", f"--wd={os.getcwd()}", "--", *command],
            env={**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), **variables},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if check and result.returncode != 0:
            raise AssertionError(f"{command}: {result.returncode}: {result.stdout}{result.stderr}")
        return result.stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        shown = self.run("scontrol", "show", "job", job)
        return shown.partition("JobState=")[2].split()[0]

    def wait_for(self, condition, what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if condition():
                    return
            except (AssertionError, OSError, IndexError):
                pass  # not up yet
            if time.monotonic() > deadline:
                logs = "".join(
                    f"\n--- {path}\n{path.read_text(errors='replace')[-2000:]}"
                    for path in sorted(self.folder.glob("*.log"))
                )
                raise AssertionError(f"after {seconds:.0f} s not: {what}{logs}")
            time.sleep(0.2)

    def down(self) -> None:
        for init in self._inits.values():
            init.send_signal(signal.SIGKILL)
            init.wait()


@contextmanager
def slurm_cluster(count: int) -> Iterator[SlurmCluster]:
    """Up within the block. Skips the test where this machine does not allow it."""
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        pytest.skip(
            f"a Slurm cluster needs {', '.join(missing)} (Debian: munge slurmctld slurmd slurm-client)"
        )
    folder = Path(tempfile.mkdtemp(prefix="cloze-slurm-"))
    folder.chmod(0o755)  # munged runs as another user
    with hosts(count + 1) as machines:
        cluster = SlurmCluster(machines, folder, count)
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.down()
            shutil.rmtree(folder, ignore_errors=True)
