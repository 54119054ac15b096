"""Files, folders and globs in, the files that a corpus is made of out, or all that is wrong with them."""

import glob
import os
from pathlib import Path
from typing import NamedTuple

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
SUPPORTED = f"{' '.join(FORMATS)}, each also {' '.join(COMPRESSIONS)}"


class InputFile(NamedTuple):
    source: str
    path: str  # absolute
    relative: str  # to the common parent of the source's files
    nbytes: int  # on disk
    mtime_ns: int


def find_files(sources: dict[str, tuple[str, ...]]) -> tuple[list[InputFile], list[str]]:
    """(files, notes) of all sources, in the order of source and relative path.

    Each entry is a file, a folder (searched through, hidden names left out) or a glob. notes: what was
    left out of folders. ValueError, with all problems in one message: nothing there, no match, unreadable
    or empty files, unknown suffixes.
    """
    files: list[InputFile] = []
    problems: list[str] = []
    notes: list[str] = []
    for source in sorted(sources):
        paths: set[str] = set()
        for entry in sources[source]:
            found, left_out = _expand(entry)
            if left_out:
                some = ", ".join(sorted(left_out)[:3])
                notes.append(f"{source}: left out {len(left_out)} other files of {entry}: {some}")
            if not found:
                problems.append(f"{source}: {_why_nothing(entry)}")
            paths.update(os.path.abspath(path) for path in found)
        good = [path for path in sorted(paths) if not _note_problem(source, path, problems)]
        files += _with_relative_names(source, good)
    if problems:
        raise ValueError(capped("input that cannot be used:", problems))
    return files, notes


def capped(heading: str, problems: list[str], limit: int = 20) -> str:
    """One message of at most `limit` problems, one a line."""
    lines = [heading, *problems[:limit]]
    if len(problems) > limit:
        lines.append(f"and {len(problems) - limit} more")
    return "\n  ".join(lines)


def _expand(entry: str) -> tuple[list[str], list[str]]:
    """(files, files left out) that one entry of a source stands for."""
    if os.path.isdir(entry):
        every = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(entry)
            for name in names
            if not any(part.startswith(".") for part in Path(folder, name).relative_to(entry).parts)
        ]
        usable = [path for path in every if suffixes_of(path) is not None]
        return usable, [path for path in every if suffixes_of(path) is None]
    if os.path.exists(entry):
        return [entry], []
    found, left_out = [], []
    for match in glob.glob(entry, recursive=True):
        inside, others = _expand(match) if os.path.isdir(match) else ([match], [])
        found += inside
        left_out += others
    return found, left_out


def _why_nothing(entry: str) -> str:
    if os.path.isdir(entry):
        return f"{entry} is a folder without any file of a supported kind ({SUPPORTED})"
    if glob.has_magic(entry):
        return f"no file matches {entry}"
    return f"{entry} does not exist"


def _note_problem(source: str, path: str, problems: list[str]) -> bool:
    """Add to `problems` what keeps a file from being read at all; whether there was something."""
    before = len(problems)
    if suffixes_of(path) is None:
        problems.append(f"{source}: {path} has an unknown suffix; supported are {SUPPORTED}")
    else:
        try:
            path.encode("utf-8")
            with open(path, "rb") as file:
                if not file.read(1):
                    problems.append(f"{source}: {path} is empty")
        except UnicodeEncodeError:
            problems.append(f"{source}: the name of {path!a} is not UTF-8: rename it")
        except OSError as error:
            problems.append(f"{source}: {path} cannot be read: {error.strerror}")
    return len(problems) > before


def _with_relative_names(source: str, paths: list[str]) -> list[InputFile]:
    if not paths:
        return []
    parent = os.path.commonpath([os.path.dirname(path) for path in paths])
    files = []
    for path in paths:
        status = os.stat(path)
        name = Path(path).relative_to(parent).as_posix()
        files.append(InputFile(source, path, name, status.st_size, status.st_mtime_ns))
    return sorted(files, key=lambda file: file.relative)


def suffixes_of(path: str) -> tuple[str, str] | None:
    """(format, compression or "") of a file name; None when it is not supported."""
    stem, last = os.path.splitext(path.lower())
    compression = last if last in COMPRESSIONS else ""
    kind = os.path.splitext(stem)[1] if compression else last
    return (kind, compression) if kind in FORMATS else None
