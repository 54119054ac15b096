"""The container's recipe is whole, as far as can be told without building it; what runs in one works."""

import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from support import ROOT, environment, free_port, read_metrics, tiny_preset

from trainer.checkpoint_files import list_checkpoints, step_of

DOCKERFILE = ROOT / "container" / "Dockerfile"
BASE = "nvidia/cuda:"


def instructions() -> list[tuple[str, str]]:
    """(COPY, its words) ... of the Dockerfile, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (line.split()[0], line.partition(" ")[2].strip())
        for line in joined.splitlines()
        if line.strip()
    ]


def of_kind(kind: str) -> list[str]:
    return [words for name, words in instructions() if name == kind]


def pip_commands(text: str) -> list[list[str]]:
    """The words after `pip` of every pip command of a shell text, without what differs on purpose."""
    commands = [shlex.split(part) for part in re.split(r"&&|\n", text) if " -m pip " in part]
    return [
        [re.sub(r"^\.\[.*\]$", ".[]", word) for word in words[3:] if word != "--no-cache-dir"]
        for words in commands
    ]


def test_what_is_copied_exists_and_is_all_there_is() -> None:
    copied = [shlex.split(words)[:-1] for words in of_kind("COPY")]
    sources = {source for words in copied for source in words}
    assert [source for source in sources if not (ROOT / source).exists()] == []
    packages = {"launcher", "trainer", "model", "data"}
    assert packages | {"configs", "ds_configs", "pyproject.toml", "constraints.txt"} <= sources
    ignore = (ROOT / "container" / "Dockerfile.dockerignore").read_text().split("\n")
    assert {line[1:] for line in ignore if line.startswith("!")} == sources
    assert "*" in ignore


def test_packages_are_installed_as_by_make() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("venv .venv")[2].partition("touch $@")[0]
    made = pip_commands(recipe.replace("$(BIN)", ".venv/bin"))
    assert len(made) == 3
    scripts = "\n".join(of_kind("RUN"))
    assert pip_commands(scripts) == made
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in settings["packages"]:  # found as packages while they are empty
        assert f"{package.replace('.', '/')}/__init__.py" in scripts.split()


def test_the_recipe_is_sound() -> None:
    for script in of_kind("RUN"):
        subprocess.run(["bash", "-n", "-c", script], check=True)
    assert of_kind("ARG")[0].startswith(f"BASE_IMAGE={BASE}")
    assert of_kind("FROM") == ["${BASE_IMAGE}"]
    names = [name for name, _ in instructions()]
    assert of_kind("USER") == ["cloze"] and names[-3:] == ["USER", "ENV", "CMD"]
    assert "ADD" not in names and of_kind("ARG")[1:] == []  # nothing from outside, and no secret


def start(
    port: int, preset: Path, *overrides: str, machines: int = 2
) -> list[subprocess.Popen[str]]:
    """`container/node.sh` as two machines would run it."""
    command = ["container/node.sh", str(machines), "1", f"127.0.0.1:{port}", str(preset)]
    variables = {**environment(), "CLOZE_VENV": sys.prefix}
    return [
        subprocess.Popen(
            [*command, *overrides], cwd=ROOT, env=variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for _ in range(machines)
    ]  # fmt: skip


def ends(nodes: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    """The status of each, and all that they said."""
    said = [node.communicate(timeout=240)[0] for node in nodes]
    return [node.returncode for node in nodes], "".join(said)


def test_two_machines_save_when_one_is_told_to_stop(tiny_dataset: Path, tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, steps=100_000, save_every=0)
    nodes = start(free_port(), preset)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or not metrics.read_text():
        assert time.monotonic() < deadline and all(node.poll() is None for node in nodes)
        time.sleep(0.05)
    nodes[1].send_signal(signal.SIGTERM)
    statuses, said = ends(nodes)
    assert statuses == [75, 75], said
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert step_of(checkpoint) == read_metrics(tmp_path / "run")[-1]["step"] > 0


def test_the_end_of_a_run_and_what_another_start_would_not_mend(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset)
    for override, status in (("optim.learning_rate=0", 78), ("optim.learning_rate=1e-3", 0)):
        statuses, said = ends(start(free_port(), preset, override, machines=1))
        assert statuses == [status], said
