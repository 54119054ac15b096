"""Text files of any kind in, one plain .jsonl out, which every library reads."""

import json
from pathlib import Path

from data.documents import Problem, ReadOptions, read_records


def plain_jsonl(sources: list[str], target: Path, max_bytes: int) -> Path:
    """The documents of all files in one uncompressed .jsonl, which every library reads."""
    num_bytes = 0
    with target.open("w", encoding="utf-8") as file:
        for source in sources:
            for record in read_records(source, ReadOptions()):
                if isinstance(record, Problem):
                    raise ValueError(record.message)
                if not record.text.strip():
                    continue
                num_bytes += file.write(
                    json.dumps({"text": record.text}, ensure_ascii=False) + "\n"
                )
                if num_bytes > max_bytes:
                    return target
    return target
