"""slurm/cluster.env in, the variables that it sets out: what a cluster needs besides."""

import os
import subprocess

from launcher.environment import ROOT

SITE = ROOT / "slurm" / "cluster.env"


def site_environment() -> dict[str, str]:
    """Our variables, and those that slurm/cluster.env sets or changes. ValueError where it fails."""
    if not SITE.exists():
        return dict(os.environ)
    result = subprocess.run(
        ["bash", "-c", 'set -ae; source "$1" >&2; env -0', "bash", str(SITE)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode != 0:
        raise ValueError(
            f"{SITE} ends with status {result.returncode}: {result.stderr.strip()[-500:]}"
        )
    pairs = (entry.partition("=") for entry in result.stdout.split("\0") if entry)
    return {name: value for name, _, value in pairs}


def site_variables() -> dict[str, str]:
    """SBATCH_* variables alone, that slurm/cluster.env sets: sbatch reads them itself. ValueError as above."""
    if not SITE.exists():
        return {}
    return {n: value for n, value in site_environment().items() if n.startswith("SBATCH_")}
