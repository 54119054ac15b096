"""The two types that every cleaning step speaks: a document goes in, a verdict comes out.

A step is a frozen dataclass of its thresholds with a `name`, and a pure function of one document:
no step knows of files, ranks or other documents, so any executor may run it anywhere, in any order.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Document(NamedTuple):
    """One document on its way through the pipeline."""

    id: str  # "<file relative to its source>#<record>": the same wherever the corpus lies
    text: str
    metadata: dict[str, str]  # what readers and steps learnt: url, own_id, encoding, language ...


@dataclass(frozen=True)
class Verdict:
    """What a step makes of a document."""

    text: str | None  # the text to go on with, changed or not; None: the document is dropped
    reason: str | None = None  # why it was dropped, as a fixed name ("too_few_words"), for counting
    detail: str = ""  # the figures behind it: "12 words, at least 50 are wanted"
    changes: dict[str, int] = field(
        default_factory=dict
    )  # what was changed how often: {"email": 2}
    metadata: dict[str, str] = field(
        default_factory=dict
    )  # what later steps and the output are told


class Step(Protocol):
    """Anything with a name that judges one document."""

    @property
    def name(self) -> str: ...

    def __call__(self, document: Document) -> Verdict: ...
