"""Two and three machines, by torchrun's rendezvous and by DeepSpeed's launcher over ssh: the curve of one."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hosts import Hosts, hosts
from support import ROOT, environment, launch, tiny_preset
from test_trainer_stopping import curve, ledger, wait_for_step

STEPS = 40
CHANGES = {"steps": STEPS, "save_every": 10, "hang_timeout_seconds": 4, "global_batch_size": 24}


@pytest.fixture(scope="module", params=[2, 3])
def one_host(
    request: pytest.FixtureRequest, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, list[tuple]]:
    """(processes, curve) of as many processes on one machine."""
    folder = tmp_path_factory.mktemp("one_host")
    preset = tiny_preset(folder, tiny_dataset, **CHANGES, data={"num_lanes": 24})
    assert launch(preset, processes=request.param).returncode == 0
    return request.param, curve(folder / "run")


def torchrun_on(
    machines: Hosts, number: int, preset: Path, *, max_restarts: int = 0
) -> subprocess.Popen[str]:
    """The command that is the same on every machine: they meet at host 0."""
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(machines.spaces)}", "--nproc-per-node=1",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={machines.address(0)}:29500", "--rdzv-id=test",
        f"--max-restarts={max_restarts}", "-m", "launcher.train", str(preset),
    ]  # fmt: skip
    return subprocess.Popen(
        machines.command(number, command), cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_torchrun_meets_at_one_of_the_hosts(
    one_host: tuple[int, list[tuple]], tiny_dataset: Path, tmp_path: Path
) -> None:
    count, expected = one_host
    preset = tiny_preset(tmp_path, tiny_dataset, **CHANGES, data={"num_lanes": 24})
    with hosts(count) as machines:
        started = [torchrun_on(machines, number, preset) for number in range(count)]
        said = [process.communicate(timeout=200)[1] for process in started]
    assert [process.returncode for process in started] == [0] * count, said
    assert curve(tmp_path / "run") == expected


@pytest.mark.parametrize("one_host", [2], indirect=True)
def test_torchrun_starts_again_after_a_cable_was_pulled(
    one_host: tuple[int, list[tuple]], tiny_dataset: Path, tmp_path: Path
) -> None:
    """Both ends stop, torchrun waits for the other one, and the run goes on when it is back."""
    run = tmp_path / "run"
    preset = tiny_preset(tmp_path, tiny_dataset, **CHANGES, data={"num_lanes": 24})
    with hosts(2) as machines:
        started = [torchrun_on(machines, n, preset, max_restarts=3) for n in range(2)]
        wait_for_step(run, 12)
        machines.unplug(1)
        deadline = time.monotonic() + 60
        while not ledger(run, "end") and time.monotonic() < deadline:  # one end has given up
            time.sleep(0.1)
        time.sleep(3)  # and the other one, which stood still at the same time
        machines.mend(1)
        said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "the run hangs: rank 0 (host0, pid" in said[0]
    assert curve(run) == one_host[1]


@contextmanager
def ssh_between(machines: Hosts, folder: Path) -> Iterator[dict[str, str]]:
    """sshd on every host, one key for all; the variables with which `ssh hostN` just works."""
    if missing := [
        name for name in ("/usr/sbin/sshd", "ssh-keygen", "pdsh") if not shutil.which(name)
    ]:
        pytest.skip(
            f"DeepSpeed's launcher needs {', '.join(missing)} (Debian: openssh-server pdsh)"
        )
    key, sshd = folder / "key", []
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    allowed = folder / "allowed"
    allowed.write_bytes(key.with_suffix(".pub").read_bytes())
    options = [
        f"HostKey={key}", f"AuthorizedKeysFile={allowed}", "StrictModes=no", "UsePAM=no", "PidFile=none",
        "PermitRootLogin=prohibit-password",
    ]  # fmt: skip
    words = [word for option in options for word in ("-o", option)]
    Path("/run/sshd").mkdir(exist_ok=True)
    for number in range(len(machines.spaces)):
        command = ["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", *words]
        with (folder / f"sshd{number}.log").open("wb") as log:
            sshd.append(subprocess.Popen(machines.command(number, command), stderr=log))
    client = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    try:
        yield {"PDSH_SSH_ARGS_APPEND": f"{client} -i {key}"}
    finally:
        for process in sshd:
            process.kill()
            process.wait()


def test_deepspeeds_launcher_over_ssh(
    one_host: tuple[int, list[tuple]], tiny_dataset: Path, tmp_path: Path
) -> None:
    count, expected = one_host
    preset = tiny_preset(tmp_path, tiny_dataset, **CHANGES, data={"num_lanes": 24})
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"host{number} slots=1\n" for number in range(count)))
    exported = tmp_path / "deepspeed_env"  # what else would not reach the other hosts
    exported.write_text("OMP_NUM_THREADS=1\n")
    with hosts(count) as machines, ssh_between(machines, tmp_path) as variables:
        command = [
            str(Path(sys.executable).parent / "deepspeed"), "--hostfile", str(hostfile), "--master_addr",
            machines.address(0), "--no_ssh_check", "--module", "launcher.train", str(preset),
        ]  # fmt: skip
        result = subprocess.run(
            machines.command(0, command), cwd=ROOT,
            env={**environment(), **variables, "DS_ENV_FILE": str(exported)},
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert curve(tmp_path / "run") == expected
