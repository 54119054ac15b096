"""What the documentation tells people to type exists and parses; what it points to is there."""

import argparse
import ast
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support import ROOT

from launcher.cli import parse
from launcher.prepare import prepare_config
from launcher.train import add_train_arguments
from trainer.config import load_config
from trainer.ds import read_deepspeed_json
from trainer.exit_status import CONFIG, DIVERGED, PREEMPTED, STORAGE

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(
    r"(?:configs|data|docs|ds_configs|launcher|model|slurm|tests|trainer|bench|container)/[\w./-]+\.\w+"
)
MADE_BY_USERS = {"slurm/cluster.env"}


def blocks(page: Path, language: str) -> Iterator[str]:
    for found, text in CODE_BLOCK.findall(page.read_text(encoding="utf-8")):
        if found == language:
            yield text


def commands_of(text: str) -> Iterator[list[str]]:
    """Each command of a shell text as words: loops opened, variables set before it left out."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"^for .*; do (.*); done$", r"\1", line.strip())
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def shown_commands() -> Iterator[tuple[str, list[str]]]:
    """(where, words) of every command in the pages, the presets' headers and the Slurm scripts'."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for words in commands_of(block):
                yield page.name, words
    scripts = [*ROOT.glob("slurm/*.sbatch"), ROOT / "container" / "Dockerfile"]
    for file in sorted([*ROOT.glob("configs/*.yaml"), *scripts]):
        header = "".join(
            f"{line[4:]}\n" for line in file.read_text().splitlines() if line.startswith("#   ")
        )
        for words in commands_of(header):
            yield file.name, words


COMMANDS = list(shown_commands())


def check_train(words: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_train_arguments(parser)
    options = parser.parse_args(words)
    config = load_config(ROOT / options.preset, options.overrides)
    read_deepspeed_json(ROOT / config.deepspeed)


def check_cloze(words: list[str]) -> None:
    options = parse(words)
    if options.command == "train":
        config = load_config(ROOT / options.preset, options.overrides)
        read_deepspeed_json(ROOT / config.deepspeed)
    elif options.command == "prepare":
        prepare_config(options)


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    assert options.module
    if options.training_script == "launcher.cli":
        check_cloze(options.training_script_args)
    else:
        assert options.training_script == "launcher.train"
        check_train(options.training_script_args)


def check_deepspeed(words: list[str]) -> None:
    from deepspeed.launcher.runner import parse_args

    options = parse_args(words)
    assert options.module
    assert options.user_script == "launcher.train"
    check_train(options.user_args)


def check_sbatch(words: list[str]) -> None:
    script = next(i for i, word in enumerate(words) if not word.startswith("-"))
    assert all(re.fullmatch(r"--[a-z-]+=\S+", word) for word in words[:script]), words
    assert (ROOT / words[script]).is_file()
    command = Path(words[script]).stem
    arguments = [word.replace("%a", "1") for word in words[script + 1 :]]
    if command == "train":
        check_train(arguments)
    else:
        check_cloze([command, *arguments])


def check_salloc(words: list[str]) -> None:
    command = words.index("cloze")
    assert all(re.fullmatch(r"--[a-z-]+=\S+", word) for word in words[:command]), words
    check_cloze(words[command + 1 :])


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets)


def check_python(words: list[str]) -> None:
    assert words[0] == "-m"
    assert importlib.util.find_spec(words[1])


def check_files(words: list[str]) -> None:
    assert (ROOT / words[0]).exists() or words[0] == ".venv/bin/activate"


def check_tensorboard(words: list[str]) -> None:
    assert words[0] == "--logdir" and len(words) == 2


def check_node(words: list[str]) -> None:
    """container/node.sh MACHINES PROCESSES FIRST_MACHINE:PORT PRESET ..."""
    machines, processes, first, *rest = words
    assert machines.isdigit() and processes.isdigit() and re.fullmatch(r"[^:]+:\d+", first)
    check_train(rest)


def check_container(words: list[str]) -> None:
    """docker, apptainer, enroot: files that are named exist, and a command of ours inside parses."""
    assert words[0] in ("build", "run", "save", "exec", "import")
    if "--file" in words:
        assert (ROOT / words[words.index("--file") + 1]).is_file()
    if "container/node.sh" in words and words[0] == "run":
        check_node(words[words.index("container/node.sh") + 1 :])
    if "cloze" in words and words[0] in ("run", "exec") and words[-1] != "--help":
        check_cloze(words[words.index("cloze") + 1 :])


CHECKS = {
    "cloze": check_cloze,
    "torchrun": check_torchrun,
    "deepspeed": check_deepspeed,
    "sbatch": check_sbatch,
    "container/node.sh": check_node,
    "docker": check_container,
    "apptainer": check_container,
    "enroot": check_container,
    "salloc": check_salloc,
    "make": check_make,
    "python": check_python,
    "tensorboard": check_tensorboard,
    "cp": check_files,
    "source": check_files,
}


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page}: {shlex.join(words)}" for page, words in COMMANDS]
)
def test_every_command_shown_parses(page: str, words: list[str]) -> None:
    assert words[0] in CHECKS, f"{page} shows {words[0]}, which this test cannot check"
    CHECKS[words[0]](words[1:])


def test_the_readme_shows_every_way_to_start() -> None:
    shown = {words[0] for page, words in COMMANDS if page == "README.md"}
    assert {"make", "cloze", "torchrun", "deepspeed", "sbatch", "tensorboard"} <= shown


def test_the_check_finds_what_does_not_parse() -> None:
    for wrong in (
        "cloze train configs/tiny.yaml stepss=3",
        "sbatch slurm/none.sbatch configs/tiny.yaml",
    ):
        name, *words = wrong.split()
        with pytest.raises((ValueError, AssertionError)):
            CHECKS[name](words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    links = [link.split("#")[0] for link in LINK.findall(text) if not link.startswith("http")]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    paths = [path for path in INLINE.findall(text) if PATH.fullmatch(path)]
    paths = [path for path in paths if path not in MADE_BY_USERS]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []


def test_python_examples_compile_and_import_what_exists() -> None:
    examples = [block for page in PAGES for block in blocks(page, "python")]
    assert examples
    for example in examples:
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom):
                assert node.module and importlib.util.find_spec(node.module), node.module


def test_every_code_block_says_its_language_or_is_a_drawing() -> None:
    """A command in a block without a language would not be checked."""
    for page in PAGES:
        for block in blocks(page, ""):
            first = [line.split()[0] for line in block.splitlines() if line.strip()]
            assert not set(first) & set(CHECKS), page.name


def test_job_scripts_of_other_schedulers_are_sound() -> None:
    scripts = [script for page in PAGES for script in blocks(page, "sh")]
    assert len(scripts) == 3
    for script in scripts:
        subprocess.run(["bash", "-n", "-c", script], check=True)
        words = shlex.split(script.replace("\\\n", " "), comments=True)
        start = words.index("$PWD/container/node.sh") + 1
        end = next(i for i, word in enumerate(words) if word.startswith("time_limit_minutes")) + 1
        check_node([word.replace("$first", "node1") for word in words[start:end]])


def test_the_kubernetes_manifest_says_what_our_statuses_mean() -> None:
    page = ROOT / "docs" / "schedulers.md"
    (manifest,) = blocks(page, "yaml")
    service, job = yaml.safe_load_all(manifest)
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (node,) = pod["containers"]
    script, *words = node["command"]
    assert (ROOT / script).is_file()
    check_node(words)
    assert spec["completions"] == spec["parallelism"] == int(words[0])
    assert node["resources"]["limits"]["nvidia.com/gpu"] == int(words[1])
    name = job["metadata"]["name"]
    assert words[2].startswith(f"{name}-0.{pod['subdomain']}:")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    rules = {
        status: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
        for status in rule["onExitCodes"]["values"]
    }
    final = dict.fromkeys((STORAGE, CONFIG, DIVERGED), "FailJob")
    assert rules == {**final, PREEMPTED: "Ignore"}
    assert {
        rule["onExitCodes"]["containerName"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    } == {node["name"]}
    mounts = {mount["name"] for mount in node["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
