"""The stages of a corpus run as datatrove steps: read, clean, find copies, leave them out.

Between two steps of a stage travel datatrove documents, so its own blocks could stand there too. Between
stages lie files. Each task of a stage is a pure function of its number and what lies there.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document as Travelling
from datatrove.pipeline.base import PipelineStep

from data.corpus.duplicates import DedupConfig, Removals, SignatureWriter, cluster, match
from data.corpus.output import (
    WORK,
    DocumentWriter,
    counts_path,
    documents_path,
    dropped_path,
    read_documents,
    staged_path,
)
from data.corpus.readers import read_file
from data.corpus.recipe import SourceConfig
from data.corpus.steps import Document, Step
from data.corpus.tally import Tally
from data.corpus.watch import end_with_parent
from data.files import write_json

COPIES = "copies"
Documents = Iterator[Travelling]


class CorpusTask(NamedTuple):
    """One input file."""

    source: str
    path: str
    relative: str  # its name in ids
    config: SourceConfig


class CorpusStep(PipelineStep, ABC):
    """A datatrove step that says what it does with a task's documents."""

    @abstractmethod
    def work(self, data: Documents, rank: int) -> Documents:
        """The documents that go on to the next step. rank: number of the task."""

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        end_with_parent()
        yield from self.work(iter(data or ()), rank)


class Ledger:
    """A task's tally and its file of dropped documents; opened by the first step, closed by the last."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.dropped: DocumentWriter | None = None

    def drop(self, step: str, reason: str, document: Document, detail: str) -> None:
        assert self.dropped is not None
        self.tally.dropped(step, reason, (document.id, document.text), detail)
        label = document.metadata.get("label")
        if label is not None:
            self.tally.labels[label][f"dropped by {step}: {reason}"] += 1
        self.dropped.write(
            {"id": document.id, "step": step, "reason": reason, "detail": detail}
            | document.metadata
            | {"text": document.text}
        )


class Read(CorpusStep):
    """Nothing in, the documents of one input file out."""

    name, type = "read", "reader"

    def __init__(self, tasks: list[CorpusTask], ledger: Ledger, stop_on_problems: bool) -> None:
        super().__init__()
        self.tasks, self.ledger, self.stop_on_problems = tasks, ledger, stop_on_problems

    def work(self, data: Documents, rank: int) -> Documents:
        task = self.tasks[rank]
        for raw in read_file(task.path, task.config):
            name = f"{task.relative}#{raw.number}"
            metadata = {**raw.metadata, "source": task.source}
            if raw.text is None or raw.reason is not None:
                if self.stop_on_problems:
                    raise ValueError(
                        f"{task.path}, record {raw.number}: {raw.reason}: {raw.detail}"
                    )
                self.ledger.tally.counts["read/documents"] += 1
                self.ledger.drop("read", raw.reason or "", Document(name, "", metadata), raw.detail)
                continue
            self.ledger.tally.read(raw.text)
            yield Travelling(text=raw.text, id=name, metadata=metadata)


class Clean(CorpusStep):
    """Documents in, those that a step keeps out, changed as it wants."""

    type = "cleaning"

    def __init__(self, step: Step, ledger: Ledger) -> None:
        self.name = step.name
        super().__init__()
        self.step, self.ledger = step, ledger

    def work(self, data: Documents, rank: int) -> Documents:
        counts = self.ledger.tally.counts
        for travelling in data:
            document = Document(travelling.id, travelling.text, travelling.metadata)
            verdict = self.step(document)
            counts[f"{self.name}/documents"] += 1
            travelling.metadata |= verdict.metadata
            if verdict.text is None:
                self.ledger.drop(self.name, verdict.reason or "dropped", document, verdict.detail)
                continue
            if verdict.changes or verdict.text != document.text:
                texts = (document.text, verdict.text)
                self.ledger.tally.changed(self.name, verdict.changes, document.id, texts)
                before = travelling.metadata.get("changed")
                travelling.metadata["changed"] = f"{before}+{self.name}" if before else self.name
            travelling.text = verdict.text
            yield travelling


class Stage(CorpusStep):
    """Documents in, nothing out: written beside their signatures, with the task's counts last."""

    name, type = "stage", "writer"

    def __init__(
        self, output: Path, tasks: list[CorpusTask], dedup: DedupConfig | None, ledger: Ledger
    ) -> None:
        super().__init__()
        self.output, self.tasks, self.dedup, self.ledger = output, tasks, dedup, ledger

    def work(self, data: Documents, rank: int) -> Documents:
        self.ledger.tally = Tally()  # steps are lazy: nothing has been read yet
        dropped = DocumentWriter(dropped_path(self.output, self.tasks[rank].source, rank))
        with (
            dropped as self.ledger.dropped,
            DocumentWriter(staged_path(self.output, rank)) as staged,
        ):
            if self.dedup is None:
                for document in data:
                    staged.write({"id": document.id, "text": document.text, **document.metadata})
            else:
                with SignatureWriter(self.output / WORK, rank, self.dedup) as signatures:
                    for document in data:
                        staged.write(
                            {"id": document.id, "text": document.text, **document.metadata}
                        )
                        signatures.add(document.id, document.text)
        self.ledger.dropped = None
        write_json(counts_path(self.output, "clean", rank), self.ledger.tally.to_json())
        yield from ()


class Match(CorpusStep):
    """One pass over the signatures of all tasks: the content, or a band."""

    name, type = "match", "dedup"

    def __init__(self, output: Path, num_tasks: int, dedup: DedupConfig) -> None:
        super().__init__()
        self.output, self.num_tasks, self.dedup = output, num_tasks, dedup

    def work(self, data: Documents, rank: int) -> Documents:
        match(self.output / WORK, self.dedup.passes[rank], self.num_tasks, self.dedup)
        yield from ()


class Cluster(Match):
    """Pairs of all passes in, what each task is to leave out; a single task."""

    name = "cluster"

    def work(self, data: Documents, rank: int) -> Documents:
        counts = cluster(self.output / WORK, self.num_tasks, self.dedup)
        write_json(self.output / WORK / "clusters.json", counts._asdict())
        yield from ()


class Publish(CorpusStep):
    """A task's documents without the copies: what `cloze prepare` reads."""

    name, type = "publish", "writer"

    def __init__(self, output: Path, tasks: list[CorpusTask], with_copies: bool) -> None:
        super().__init__()
        self.output, self.tasks, self.with_copies = output, tasks, with_copies

    def work(self, data: Documents, rank: int) -> Documents:
        source = self.tasks[rank].source
        removals = None if self.with_copies else Removals(self.output / WORK, rank)
        ledger = Ledger()
        dropped = DocumentWriter(dropped_path(self.output, source, rank, COPIES))
        documents = DocumentWriter(documents_path(self.output, source, rank))
        with dropped as ledger.dropped, documents:
            for index, value in enumerate(read_documents(staged_path(self.output, rank))):
                removal = removals.get(index) if removals else None
                name, text = value.pop("id"), value.pop("text")
                if removal is not None:
                    detail = f"like {removal.of} ({removal.similarity:.2f})"
                    ledger.drop(COPIES, removal.kind, Document(name, text, value), detail)
                    continue
                self._keep(ledger.tally, documents, name, text, value)
        write_json(counts_path(self.output, "publish", rank), ledger.tally.to_json())
        yield from ()

    def _keep(
        self,
        tally: Tally,
        documents: DocumentWriter,
        name: str,
        text: str,
        metadata: dict[str, Any],
    ) -> None:
        tally.kept(text, metadata)
        changed = metadata.pop("changed", None)
        label = metadata.pop("label", None)
        if label is not None:
            tally.labels[label][f"kept, changed by {changed}" if changed else "kept"] += 1
        documents.write({"id": name, "text": text, **metadata})


def load_tally(path: Path) -> Tally:
    return Tally.from_json(json.loads(path.read_bytes()))
