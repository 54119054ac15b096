"""What `cloze prepare` is asked to do in, a checked plan out, and the folder it is carried out in.

The plan is written before any work. A later run carries on if it was asked for the same of the same
files, and refuses otherwise, telling what differs.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.block_table import MAX_BLOCK_TOKENS
from data.documents import ReadOptions
from data.executors import EXECUTORS, Executor
from data.files import TEMPORARY_MARK, read_json, remove_temporaries, write_json
from data.inputs import InputFile, capped
from data.manifest import SOURCE_NAME
from data.vocab import Tokenizer
from data.words import WORD_STARTS, WordStarts, han_segmenter

PLAN_FILE = "prepare.json"
MANIFEST_FILE = "manifest.json"
WORK_FOLDER = ".work"
PLAN_FORMAT = "cloze-prepare-v1"


@dataclass(frozen=True)
class PrepareConfig:
    """Raw text to a dataset."""

    output: str  # folder of the dataset
    sources: dict[str, tuple[str, ...]]  # source name -> files, folders or globs
    vocab_size: int = 32768  # of the tokenizer that is trained
    tokenizer_kind: Literal["unigram", "bpe", "wordpiece"] = "unigram"
    lowercase: bool = False  # of a wordpiece tokenizer that is trained; it takes accents off, too
    tokenizer: str | None = None  # folder of an existing tokenizer, used instead
    tokenizer_sample_bytes: int = 32 << 20  # text it is trained on: bounds time and memory
    text_field: str = "text"  # jsonl key or parquet column
    id_field: str = "id"  # the document's own id, kept in the metadata; may be absent
    heldout_fraction: float = 0.005  # share of documents kept for evaluation
    block_tokens: int = 1 << 18  # unit of reading and shuffling
    shard_text_bytes: int = 256 << 20
    seed: int = 1  # of the shuffle and of the held-out split
    # "file" loses nothing of a text's run, and where it does not fit (one large file of many documents)
    # the split fails with a hint; blank lines would silently make every paragraph of a book a document.
    txt_documents: Literal["file", "blank_line"] = "file"
    word_starts: WordStarts = "pieces"  # what the Chinese words of whole-word masking are
    executor: Executor = "local"
    num_processes: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        at_least = {
            "vocab_size": 6 if self.tokenizer_kind == "wordpiece" else 262,
            "tokenizer_sample_bytes": 1 << 10,
            "block_tokens": 128,
            "shard_text_bytes": 1 << 10,
            "num_processes": 1,
        }
        problems = [
            f"{name} {getattr(self, name)} is below {least}"
            for name, least in at_least.items()
            if getattr(self, name) < least
        ]
        if self.block_tokens > MAX_BLOCK_TOKENS:
            problems.append(f"block_tokens {self.block_tokens} is above {MAX_BLOCK_TOKENS}")
        if not 0 < self.heldout_fraction < 1:
            problems.append(f"heldout_fraction {self.heldout_fraction} is not between 0 and 1")
        problems += self._unknown_choices()
        if self.lowercase and self.tokenizer_kind != "wordpiece":
            problems.append(
                f"lowercase is for tokenizer_kind wordpiece; it is {self.tokenizer_kind}"
            )
        if not self.sources or not all(self.sources.values()):
            problems.append(
                "no text is given: every source needs at least one file, folder or glob"
            )
        problems += [
            f"source name {name!r}: use 1 to 40 of a-z, 0-9 and _"
            for name in self.sources
            if not SOURCE_NAME.fullmatch(name)
        ]
        if problems:
            raise ValueError("; ".join(problems))

    def _unknown_choices(self) -> list[str]:
        choices = {
            "tokenizer_kind": ("unigram", "bpe", "wordpiece"),
            "txt_documents": ("file", "blank_line"),
            "word_starts": WORD_STARTS,
            "executor": EXECUTORS,
        }
        return [
            f"{name} {getattr(self, name)!r} is none of {', '.join(known)}"
            for name, known in choices.items()
            if getattr(self, name) not in known
        ]

    @property
    def read_options(self) -> ReadOptions:
        return ReadOptions(self.text_field, self.id_field, self.txt_documents)


def make_plan(config: PrepareConfig, files: list[InputFile]) -> dict[str, Any]:
    """All that decides the dataset's bytes: options, and path, size and time of every file."""
    han_segmenter(config.word_starts)  # ValueError if it is not installed
    options = asdict(config)
    for name in ("output", "sources", "executor", "num_processes"):
        del options[name]
    if config.tokenizer is not None:
        for name in ("vocab_size", "tokenizer_kind", "lowercase", "tokenizer_sample_bytes"):
            options[name] = None
        tokenizer = Tokenizer.load(config.tokenizer)
        options["tokenizer"] = f"{os.path.abspath(config.tokenizer)} ({tokenizer.digest})"
    return {
        "format": PLAN_FORMAT,
        "options": options,
        "files": {f"{f.source}: {f.relative}": [f.path, f.nbytes, f.mtime_ns] for f in files},
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What was planned and is asked for now, where they differ; one line each."""
    if old.get("format") != new["format"]:
        return [f"format was {old.get('format')!r}, is {new['format']!r}"]
    names = [*old["options"], *(name for name in new["options"] if name not in old["options"])]
    lines = [
        f"{name} was {old['options'].get(name)!r}, is {new['options'].get(name)!r}"
        for name in names
        if old["options"].get(name) != new["options"].get(name)
    ]
    before, now = old["files"], new["files"]
    lines += [f"file {name} is no longer among the input" for name in before if name not in now]
    lines += [f"file {name} is new" for name in now if name not in before]
    for name in before:
        if name in now and before[name] != now[name]:
            (old_path, old_bytes, _), (path, nbytes, _) = before[name], now[name]
            if old_path != path:
                lines.append(f"file {name} was {old_path}, is {path}")
            elif old_bytes != nbytes:
                lines.append(f"file {name} had {old_bytes} bytes, has {nbytes}")
            else:
                lines.append(f"file {name} was modified since (size is the same, time is not)")
    return lines


@contextmanager
def locked_folder(output: Path) -> Iterator[None]:
    """Make `output` and keep every other prepare out of it. The lock falls with the process."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder for the dataset")
    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"another `cloze prepare` is at work in {output}: wait for it") from error
    finally:
        os.close(descriptor)


def enter_folder(output: Path, plan: dict[str, Any]) -> bool:
    """Write the plan into `output`, or check the one that is there. Whether the dataset is finished.

    ValueError: the folder holds something else, or the plan of something else.
    """
    path = output / PLAN_FILE
    if not path.is_file():
        foreign = sorted(p.name for p in output.iterdir() if TEMPORARY_MARK not in p.name)
        if foreign:
            some = ", ".join(foreign[:5])
            raise ValueError(
                f"{output} is not empty and holds no plan of `cloze prepare` ({some}): give a new folder"
            )
        remove_temporaries(output)
        write_json(path, plan)
        return False
    if lines := differences(read_json(path), plan):
        finished = (output / MANIFEST_FILE).exists()
        state = "was made" if finished else "was begun"
        raise ValueError(
            capped(f"{output} {state} from something else:", lines)
            + "\nTo make another dataset give another folder, or delete this one; "
            + (
                "to keep it, do nothing."
                if finished
                else "to continue, give what was given before."
            )
        )
    remove_temporaries(output)
    return (output / MANIFEST_FILE).exists()


def abandon_folder(output: Path) -> None:
    """Take back a plan that cannot be carried out, so that it may be given anew, corrected."""
    shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)
    shutil.rmtree(output / "tokenizer", ignore_errors=True)
    (output / PLAN_FILE).unlink(missing_ok=True)
