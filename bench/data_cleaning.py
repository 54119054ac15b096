"""Text in, megabytes a CPU second out, of each cleaning step and of signatures, beside datatrove's own blocks.

datatrove's need word tokenizers of other packages (spaCy for English); what cannot run here is said so.
"""

import json
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data.corpus.boilerplate import RemoveBoilerplate
from data.corpus.language import IdentifyLanguage
from data.corpus.markup import RemoveMarkup
from data.corpus.minhash import MinHashConfig, signature
from data.corpus.mojibake import RepairMojibake
from data.corpus.normalise import Normalise
from data.corpus.pii import MaskPII
from data.corpus.quality import Quality
from data.corpus.steps import Document

NUM_DOCUMENTS = 1500


def cleaning_table(text: Path, dataset: Path) -> Iterator[str]:
    """One line per step."""
    del dataset
    with text.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in islice(file, NUM_DOCUMENTS)]
    megabytes = sum(len(t.encode()) for t in texts) / 1e6
    yield f"{len(texts)} documents, {megabytes:.1f} MB.\n"
    yield "| step | MB/s and core |\n|---|---|"
    steps = [
        RepairMojibake(), Normalise(), RemoveMarkup(), RemoveBoilerplate(),
        IdentifyLanguage(), Quality(), MaskPII(),
    ]  # fmt: skip
    documents = [Document(f"x#{n}", t, {"language": "en"}) for n, t in enumerate(texts)]
    for step in steps:
        yield f"| {step.name} | {megabytes / seconds(lambda s=step: [s(d) for d in documents]):.1f} |"

    def all_steps() -> None:
        for document in documents:
            for step in steps:
                text = step(document).text
                if text is None:
                    break
                document = document._replace(text=text)

    yield f"| all seven | {megabytes / seconds(all_steps):.1f} |"
    config = MinHashConfig()
    yield f"| signature | {megabytes / seconds(lambda: [signature(t, config) for t in texts]):.1f} |"
    for name, run in datatrove_blocks(texts):
        try:
            yield f"| datatrove {name} | {megabytes / seconds(run):.2f} |"
        except (ImportError, LookupError, TypeError) as error:
            yield f"| datatrove {name} | did not run: {str(error).splitlines()[0][:80]} |"


def seconds(run: Callable[[], Any]) -> float:
    """CPU seconds of a run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def datatrove_blocks(texts: list[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and a function that runs the block over all texts."""
    from datatrove.data import Document as Travelling
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

    documents = [Travelling(text=t, id=str(n)) for n, t in enumerate(texts[:200])]
    repeat = len(texts) / len(documents)  # the few that are slow stand for all

    def over(call: Callable[[Any], Any]) -> Callable[[], Any]:
        def run() -> None:
            for _ in range(max(1, round(repeat))):
                for document in documents:
                    call(document)

        return run

    def minhash(document: Any) -> Any:
        block = MinhashDedupSignature("/tmp", config=MinhashConfig())
        return block.get_signature(block.get_shingles(document.text))

    yield "MinHash signature", over(minhash)
    yield "Gopher quality", over(lambda d: GopherQualityFilter().filter(d))
    yield "Gopher repetition", over(lambda d: GopherRepetitionFilter().filter(d))
