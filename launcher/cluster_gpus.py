"""nvidia-smi's answers in, what is wrong with a machine's GPUs out."""

import shutil
import subprocess
from typing import NamedTuple

from data.diagnosis import Finding, finding

QUERY_SECONDS = 30  # a GPU that is lost makes nvidia-smi hang
SLOWDOWNS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
USED_MB = 1024  # of a GPU's memory before we begin: more is somebody else's
# "clocks_throttle_reasons" up to driver 530
REASONS = ("clocks_event_reasons", "clocks_throttle_reasons")


class Gpu(NamedTuple):
    """One of a machine's. None: this model does not tell."""

    number: int
    name: str
    driver: str
    memory_mb: int
    used_mb: int
    ecc_errors: int | None  # that could not be corrected, since the driver was loaded
    slowdowns: tuple[str, ...]  # that are in force


def read_gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi sees; none where there is no nvidia-smi. OSError where it fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    said = ""
    for reasons in REASONS:
        fields = ["index", "name", "driver_version", "memory.total", "memory.used",
                  "ecc.errors.uncorrected.volatile.total", *(f"{reasons}.{s}" for s in SLOWDOWNS)]  # fmt: skip
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise OSError(f"nvidia-smi does not answer within {QUERY_SECONDS} s") from None
        if result.returncode == 0:
            return [_gpu(line) for line in result.stdout.splitlines() if line.strip()]
        said = (result.stdout + result.stderr).strip()
        if "not a valid field" not in said:
            break
    raise OSError(f"nvidia-smi fails: {said[:300]}")


def _gpu(line: str) -> Gpu:
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != 6 + len(SLOWDOWNS) or not all(cells[i].isdigit() for i in (0, 3, 4)):
        raise OSError(f"nvidia-smi says {line!r}: a GPU that is lost?")
    slow = tuple(name for name, cell in zip(SLOWDOWNS, cells[6:], strict=True) if cell == "Active")
    ecc = int(cells[5]) if cells[5].isdigit() else None
    return Gpu(int(cells[0]), cells[1], cells[2], int(cells[3]), int(cells[4]), ecc, slow)


def judge_gpus(host: str, gpus: list[Gpu], num_usable: int, num_given: int | None) -> list[Finding]:
    """What is wrong with them, a Finding each; none where all is well.

    num_usable: that torch sees. num_given: that Slurm gave the job; None where it does not say.
    """
    findings = []
    if (num_given is not None and num_usable != num_given) or (gpus and not num_usable):
        found = f"torch sees {num_usable}, nvidia-smi {len(gpus)}" + (
            f", Slurm gave {num_given}" if num_given is not None else ""
        )
        advice = (
            "Training starts one process for each GPU of the job. A torch without CUDA, a driver that is too "
            "old for it, a GPU that has fallen off the bus, or CUDA_VISIBLE_DEVICES: see what "
            '`python -c "import torch; torch.cuda.init()"` says there.'
        )
        findings.append(finding("GPUs", host, found, "PROBLEM", advice))
    for gpu in gpus:
        of = f"{host}, GPU {gpu.number}"
        if gpu.ecc_errors:
            found = f"{gpu.ecc_errors} ECC errors that could not be corrected"
            advice = "Its memory is damaged, and numbers go wrong. Have the GPU reset, or leave the node out."
            findings.append(finding("GPUs", of, found, "PROBLEM", advice))
        if gpu.slowdowns:
            found = f"slowed down: {', '.join(gpu.slowdowns)}"
            advice = "Too hot, or too little power: every other GPU waits for this one. Leave the node out."
            findings.append(finding("GPUs", of, found, "WARNING", advice))
        if gpu.used_mb > USED_MB:
            found = f"{gpu.used_mb:,} of {gpu.memory_mb:,} MB are in use"
            advice = "By another job, or a process that was left behind: `nvidia-smi` on that node names it."
            findings.append(finding("GPUs", of, found, "WARNING", advice))
    return findings
