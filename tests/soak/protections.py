"""Protections and their tests in, a table out: each is switched off in a copy, and its test must fail.

    python tests/soak/protections.py --folder /scratch/proofs [--only NAME ...] [--no-check-unbroken]

A test that passes without what it tests proves nothing. So for each entry of protections.toml the tracked
files are copied, one small edit is made, and the named tests are run there: pytest must end with 1, for a
failed assertion, not for a broken fixture or import. Before that all of them must pass without an edit. Ends
with 1 when a protection could be switched off unnoticed. About 20 minutes on two cores.
"""

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT_SECONDS = 100  # of one test: one that hangs without its protection has failed
SHOWN = 90  # characters of what a failed test says


class Protection(NamedTuple):
    name: str
    file: str
    old: str  # exactly once in the file
    new: str  # what it is replaced by
    tests: list[str]  # pytest's ids; one of them must fail then


class Outcome(NamedTuple):
    status: int  # pytest's
    summary: str  # its last line: "1 failed, 2 passed in 3.21s"
    failed: str  # the first test that failed, and what it says; empty where none did
    output: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="a scratch folder, emptied")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the list's names")
    parser.add_argument("--check-unbroken", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    chosen = [p for p in read_list() if options.only is None or p.name in options.only]
    if unknown := set(options.only or ()) - {p.name for p in chosen}:
        sys.exit(f"no such protection: {', '.join(sorted(unknown))}")
    began = time.monotonic()
    if options.check_unbroken:
        check_unbroken(options.folder / "unbroken", chosen)
    print(
        "| protection switched off | what fails then | seconds |", "| --- | --- | --- |", sep="\n"
    )
    unnoticed = []
    for number, protection in enumerate(chosen):
        since = time.monotonic()
        outcome = without(protection, options.folder / f"without-{number:03d}")
        if outcome.status != 1 or not outcome.failed:
            unnoticed.append(protection.name)
            print(outcome.output[-3000:], file=sys.stderr)
        told = outcome.failed or f"**NOTHING** ({outcome.summary})"
        seconds = time.monotonic() - since
        print(f"| {protection.name} | {told} | {seconds:.0f} |", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"\n{len(chosen)} protections, {minutes:.1f} minutes, unnoticed: {unnoticed or 'none'}")
    sys.exit(bool(unnoticed))


def read_list() -> list[Protection]:
    listed = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return [Protection(**entry) for entry in listed["protection"]]


def check_unbroken(folder: Path, protections: list[Protection]) -> None:
    """Exit where a test of the list fails, or is skipped, though nothing is switched off."""
    copy_tree(folder)
    tests = dict.fromkeys(test for protection in protections for test in protection.tests)
    outcome = run_tests(folder, [*tests])
    remove(folder)
    print(f"nothing switched off: {len(tests)} tests, {outcome.summary}\n", flush=True)
    if outcome.status or "skipped" in outcome.summary:
        sys.exit(outcome.output[-6000:])


def without(protection: Protection, folder: Path) -> Outcome:
    """The outcome of its tests in a copy of the tree that lacks it."""
    copy_tree(folder)
    switch_off(protection, folder)
    outcome = run_tests(folder, [*protection.tests])
    remove(folder)
    return outcome


def copy_tree(folder: Path) -> None:
    """The tracked files, as they are in the working tree."""
    remove(folder)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().rstrip("\0").split("\0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def switch_off(protection: Protection, folder: Path) -> None:
    """Make the edit. ValueError where its text is not there exactly once, or what comes out is no Python."""
    path = folder / protection.file
    path.write_text(edited(path.read_text(encoding="utf-8"), protection), encoding="utf-8")


def edited(text: str, protection: Protection) -> str:
    if (count := text.count(protection.old)) != 1:
        raise ValueError(
            f"{protection.name}: {count} times, not once, in {protection.file}: {protection.old!r}"
        )
    text = text.replace(protection.old, protection.new)
    ast.parse(text, protection.file)
    return text


def run_tests(folder: Path, tests: list[str]) -> Outcome:
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
        f"--basetemp={folder / 'temporary'}", f"--timeout={TIMEOUT_SECONDS}", *tests,
    ]  # fmt: skip
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=False,
    )
    summary = result.stdout.strip().rpartition("\n")[2].strip("= ")
    # "FAILED tests/test_x.py::test_y - assert 0 == 1"; a fixture that fails is an ERROR
    found = re.search(r"^FAILED \S*?::(.+?)(?: - (.*))?$", result.stdout, re.MULTILINE)
    said = (found[2] or "").replace("|", "/").replace(str(folder), "")[:SHOWN] if found else ""
    failed = f"`{found[1]}` {said}".strip() if found else ""
    return Outcome(result.returncode, summary, failed, result.stdout + result.stderr)


def remove(folder: Path) -> None:
    """Delete a copy, and what its tests have left: processes that hang there, file systems."""
    for pid in processes_in(folder):
        os.kill(pid, signal.SIGKILL)
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        if line.split()[1].startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", line.split()[1]], check=True)
    shutil.rmtree(folder, ignore_errors=True)


def processes_in(folder: Path) -> list[int]:
    """Those that work in `folder`, or have it on their command line as a part of a path."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            works_there = Path(os.readlink(entry / "cwd")).is_relative_to(folder)
        except OSError:
            continue
        if works_there or f"{folder}/" in command:
            found.append(int(entry.name))
    return found


if __name__ == "__main__":
    main()
