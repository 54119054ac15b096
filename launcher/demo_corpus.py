"""Installed Python packages in, a corpus of their documentation out: nothing is imported or downloaded.

One document per module, its docstrings in order; one per package, the description its METADATA
carries. Code, doctests and markup are left out, wrapped lines are joined, and a paragraph that was
there before is dropped.
"""

import ast
import json
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from email import message_from_string
from inspect import cleandoc
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from data.files import publishing
from data.hashing import stable_hash64

MAX_BYTES = 12_000_000  # of text: enough to learn from, and prepared in a minute
MIN_CHARACTERS = 200  # of a document
MIN_LETTERS = 0.8  # share of a paragraph's visible characters
MIN_WORDS = 5  # of a paragraph
IGNORED_FOLDERS = frozenset({"test", "tests", "testing", "site-packages", "__pycache__"})

ROLE = re.compile(r":[\w:+-]+:`~?!?([^`<]*?)(?:\s*<[^`>]*>)?`")  # :class:`~torch.Tensor`
LITERAL = re.compile(r"(`{1,2}|\*{1,2})(?=\S)(.+?)(?<=\S)\1_{0,2}")  # ``x``, *x*, **x**
LINK = re.compile(r"!?\[([^\]]*)\](?:\([^)]*\)|\[\w*\])")  # [text](address), [text][name]
REST_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{1,2}")  # `text <address>`_
NOISE = re.compile(r"<[^<>]{0,200}>|\[\d+\]_|https?://\S+")
ITEM = re.compile(r"^(?:[-*+•]\s+|\d{1,2}[.)]\s+|:\w[\w *.,]*:\s*|#+\s+)")
MARKUP = (
    (ITEM, ""),
    (ROLE, r"\1"),
    (LINK, r"\1"),
    (REST_LINK, r"\1"),
    (NOISE, ""),
    (LITERAL, r"\2"),
)
RULE = re.compile(r"[\W_]+")  # an underline, the border of a table
FIELD = re.compile(
    r"\*{0,2}\w+`{0,2}(?: \([^)]*\))?\s*:(?:\s|$)"
)  # "x : int", "shape (tuple): ..."
DOCTEST, FENCES = (">>>", "... "), ("```", "~~~")
CODE_DIRECTIVE = re.compile(
    r"\.\.\s+(code|sourcecode|math|doctest|test|image|figure|plot|parsed-literal|\w*-?table|"
    r"toctree|auto|ipython|highlight|literalinclude|raw|_|\[)"
)


class Document(NamedTuple):
    id: str
    text: str


@dataclass
class Corpus:
    """documents: in the order they were found; num_unreadable: files that no parser takes."""

    documents: list[Document] = field(default_factory=list)
    num_files: int = 0
    num_unreadable: int = 0
    num_bytes: int = 0


def installed_folders() -> list[Path]:
    """The standard library and the installed packages of the running Python."""
    paths = sysconfig.get_paths()
    return [Path(paths["stdlib"]), Path(paths["purelib"])]


def collect(folders: list[Path], max_bytes: int = MAX_BYTES) -> Corpus:
    """Documents of the files under `folders`, until they hold `max_bytes` of UTF-8 text.

    Files come in the order of a hash of their names, so the first ones are a fair sample, and the
    same files give the same corpus.
    """
    corpus = Corpus()
    seen: set[str] = set()
    files = {name: path for folder in folders for name, path in documented_files(folder)}
    names = sorted(files, key=lambda name: (stable_hash64(name), name))
    with ProcessPoolExecutor(mp_context=get_context("forkserver")) as pool:
        found = pool.map(read_paragraphs, [files[name] for name in names], chunksize=32)
        for name, texts in zip(names, found, strict=True):
            corpus.num_files += 1
            corpus.num_unreadable += texts is None
            text = "\n".join(p for p in texts or [] if not (p in seen or seen.add(p)))
            if len(text) >= MIN_CHARACTERS:
                corpus.documents.append(Document(name, text))
                corpus.num_bytes += len(text.encode("utf-8"))
            if corpus.num_bytes >= max_bytes:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    return corpus


def documented_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name relative to `folder`, path) of every module and METADATA file, tests left out."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in IGNORED_FOLDERS]
        for name in names:
            if name.endswith(".py") or (name == "METADATA" and root.endswith(".dist-info")):
                path = Path(root, name)
                yield path.relative_to(folder).as_posix(), path


def write_corpus(documents: list[Document], path: Path) -> None:
    """One JSON object a line, with "id" and "text"; the file appears when it is complete."""
    with publishing(path) as file:
        for document in documents:
            line = json.dumps(document._asdict(), ensure_ascii=False)
            file.write(line.encode("utf-8") + b"\n")


def read_paragraphs(path: Path) -> list[str] | None:
    """The prose of one file; None where it cannot be read or parsed."""
    try:
        texts = [_description(path)] if path.name == "METADATA" else _docstrings(path)
    except (SyntaxError, ValueError, RecursionError, OSError):
        return None
    return [paragraph for text in texts for paragraph in paragraphs(text)]


def _docstrings(path: Path) -> list[str]:
    """Docstrings of a module, its classes and functions, from top to bottom. The module is only parsed."""
    with tokenize.open(path) as file:  # by the encoding that its first lines declare
        source = file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the parser, about other people's escapes
        tree = ast.parse(source)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _description(path: Path) -> str:
    """The long description of a package."""
    return str(message_from_string(path.read_text(encoding="utf-8")).get_payload())


def paragraphs(text: str) -> Iterator[str]:
    """The prose of a docstring: wrapped lines joined, code and markup left out."""
    for block in _prose_blocks(cleandoc(text.expandtabs())):
        joined = " ".join(line.strip() for line in block)
        for pattern, replacement in MARKUP:
            joined = pattern.sub(replacement, joined)
        joined = " ".join(joined.replace("::", ":").split())
        if is_prose(joined):
            yield joined


def _prose_blocks(text: str) -> Iterator[list[str]]:
    """Lines that belong together, split at blank lines and before list items; no code."""
    block: list[str] = []
    for line in [*_without_code(text.split("\n")), ""]:
        stripped = line.strip()
        if block and (not stripped or ITEM.match(stripped) or FIELD.match(stripped)):
            yield block
            block = []
        if stripped:
            block.append(line)


def _without_code(lines: list[str]) -> Iterator[str]:
    """The same lines, with "" for each that is code, the mark of a directive, or drawn."""
    code_ends: Callable[[str], bool] | None = None
    for line in lines:
        stripped = line.strip()
        if code_ends is not None and not code_ends(line):
            yield ""
            continue
        closes_fence = code_ends is not None and stripped.startswith(FENCES)
        code_ends = None if closes_fence else _code_end(line)
        drawn = RULE.fullmatch(stripped) or stripped.startswith((*FENCES, *DOCTEST, "..", "|"))
        yield "" if drawn else line


def _code_end(line: str) -> Callable[[str], bool] | None:
    """Where a line lets code begin: what is true of the line at which prose goes on. Else None."""
    stripped = line.strip()
    indent = len(line) - len(line.lstrip())
    if stripped.startswith(DOCTEST):
        return lambda later: not later.strip()
    if stripped.startswith(FENCES):
        return lambda later: later.strip().startswith(stripped[:3])
    if CODE_DIRECTIVE.match(stripped) or (stripped.endswith("::") and stripped[:2] != ".."):
        return lambda later: later.strip() != "" and len(later) - len(later.lstrip()) <= indent
    return None


def is_prose(paragraph: str) -> bool:
    """Whether this reads as a sentence or two: words, mostly of letters, and an end."""
    visible = paragraph.replace(" ", "")
    letters = sum(character.isalpha() for character in visible)
    return (
        len(paragraph.split()) >= MIN_WORDS
        and letters >= MIN_LETTERS * len(visible)
        and paragraph[-1] in ".!?:)"
        and paragraph.isprintable()
    )
