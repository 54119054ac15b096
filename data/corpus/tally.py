"""What happens to documents in, counts and examples out: one tally per task, added up for the report.

Examples are those whose ids have the smallest hashes, so that they do not depend on who came first.
"""

from collections import Counter, defaultdict
from typing import Any, NamedTuple

from data.hashing import stable_hash64

MAX_EXAMPLES = 4  # of a kind, in a report
EXCERPT = 240  # characters


class Example(NamedTuple):
    """A document that was dropped, or changed (then `after` shows the same place)."""

    order: int
    id: str
    before: str
    after: str
    detail: str


class Tally:
    """Counts of one task, or of many. All keys are plain, so that it goes through JSON."""

    def __init__(self) -> None:
        self.counts: Counter[str] = (
            Counter()
        )  # "read/documents", "quality/dropped/too_few_words" ...
        self.languages: Counter[str] = Counter()  # characters of kept text
        self.lengths: Counter[str] = (
            Counter()
        )  # kept documents by the power of two of their characters
        self.labels: dict[str, Counter[str]] = defaultdict(Counter)  # label -> outcome -> documents
        self.examples: dict[str, list[Example]] = defaultdict(list)

    def read(self, text: str) -> None:
        self.counts["read/documents"] += 1
        self.counts["read/bytes"] += len(text.encode("utf-8", "surrogatepass"))

    def kept(self, text: str, metadata: dict[str, str]) -> None:
        """A document that reaches the output of its stage."""
        self.counts["kept/documents"] += 1
        self.counts["kept/bytes"] += len(text.encode("utf-8", "surrogatepass"))
        self.languages[metadata.get("language", "not told")] += len(text)
        self.lengths[str(len(text).bit_length())] += 1

    def dropped(self, step: str, reason: str, document: tuple[str, str], detail: str) -> None:
        """document: (id, text as it was when it was dropped)."""
        name, text = document
        self.counts[f"{step}/dropped/{reason}"] += 1
        self.counts[f"{step}/dropped_bytes"] += len(text.encode("utf-8", "surrogatepass"))
        example = Example(stable_hash64(name), name, text[:EXCERPT], "", detail)
        self._add_example(f"{step}/dropped/{reason}", example)

    def changed(
        self, step: str, changes: dict[str, int], name: str, texts: tuple[str, str]
    ) -> None:
        """texts: before and after."""
        self.counts[f"{step}/changed_documents"] += 1
        for kind, count in changes.items():
            self.counts[f"{step}/changed/{kind}"] += count
        before, after = texts
        start = max(0, _first_difference(before, after) - EXCERPT // 4)
        example = Example(
            stable_hash64(name), name, before[start : start + EXCERPT], after[start : start + EXCERPT],
            ", ".join(f"{kind} {count}" for kind, count in changes.items()),
        )  # fmt: skip
        self._add_example(f"{step}/changed", example)

    def _add_example(self, kind: str, example: Example) -> None:
        examples = self.examples[kind]
        examples.append(example)
        examples.sort()
        del examples[MAX_EXAMPLES:]

    def add(self, other: "Tally") -> None:
        self.counts.update(other.counts)
        self.languages.update(other.languages)
        self.lengths.update(other.lengths)
        for label, outcomes in other.labels.items():
            self.labels[label].update(outcomes)
        for kind, examples in other.examples.items():
            for example in examples:
                self._add_example(kind, example)

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": dict(sorted(self.counts.items())),
            "languages": dict(sorted(self.languages.items())),
            "lengths": dict(sorted(self.lengths.items())),
            "labels": {label: dict(sorted(c.items())) for label, c in sorted(self.labels.items())},
            "examples": {kind: self.examples[kind] for kind in sorted(self.examples)},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Tally":
        tally = cls()
        tally.counts.update(value["counts"])
        tally.languages.update(value["languages"])
        tally.lengths.update(value["lengths"])
        for label, outcomes in value["labels"].items():
            tally.labels[label].update(outcomes)
        for kind, examples in value["examples"].items():
            tally.examples[kind] = [Example(*example) for example in examples]
        return tally


def _first_difference(first: str, second: str) -> int:
    shorter = min(len(first), len(second))
    low, high = 0, shorter
    while low < high:  # the longest common beginning, by bisection
        middle = (low + high + 1) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
