"""A run and a step in, the documents that the step was trained on out: source, file, record, own id, text.

cloze blame RUN STEP [--rows 0-7] [--text] [--json]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from data.lanes import Origin
from data.masking import Masking
from data.objectives import read_mixture
from data.provenance import LEGEND, Making, Place, Provenance, find_documents
from data.shards import Dataset
from data.transfer import is_url
from launcher.run_history import Replay, RunHistory
from launcher.tables import text_table

MAX_UNASKED = 2000  # rows that are read again for their digest without being asked to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("step", type=int, help="optimizer step, as logged: the first is 1")
    add = parser.add_argument
    add("--rows", help="places in the step's batch, e.g. 0-7,12 (default: all)")
    add("--text", action="store_true", help="show the rows' text, and what was masked")
    add("--verify", action="store_true", help="compare with the logged digest, whatever it takes")
    add("--json", action="store_true", help="one JSON object instead of tables")
    add(
        "--dataset",
        action="append",
        default=[],
        help="where the dataset lies now, if it was moved; may be given for each that the run has read",
    )


def run(options: argparse.Namespace) -> int:
    """Print what the step was trained on. 0; 1 where the digest differs from what was logged. ValueError."""
    history = RunHistory.read(options.run)
    if not 1 <= options.step <= history.last_step:
        raise ValueError(
            f"step {options.step} is not in {options.run}: what is known of it ends with step "
            f"{history.last_step} (the first is 1)"
        )
    datasets = [_open(place) for place in options.dataset or [history.config.data.path]]
    replay = Replay(history, datasets, options.step)
    numbers = replay.rows_of(options.step)
    places = parse_places(options.rows, len(numbers))
    checked = check_digest(history, datasets, options)
    report = {
        "run": str(options.run),
        "step": options.step,
        "from_step": replay.start.step if replay.start else 0,
        "phase_first_step": replay.phase_of(options.step).first_step,
        "first_row": numbers.start,
        "num_rows": len(numbers),
        "dataset": replay.dataset_of(options.step).place,
        "digest": checked,
        "rows": rows_of_step(replay, options.step, places, text=options.text),
    }
    print(json.dumps(report, ensure_ascii=False, indent=1) if options.json else as_text(report))
    return 1 if checked["verdict"] == "different" else 0


def _open(place: str) -> Dataset:
    if not is_url(place) and not Path(place).is_dir():
        raise ValueError(
            f"the run's dataset is not at {place}: if it was moved, give its new place (--dataset PATH); a "
            "relative path is relative to where training was started"
        )
    return Dataset.open(place)


def parse_places(text: str | None, num_rows: int) -> list[int]:
    """'0-3,7' -> [0, 1, 2, 3, 7]; all where None. ValueError when it is no such list, or beyond the batch."""
    if text is None:
        return list(range(num_rows))
    places: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--rows {text!r}: give places and ranges, e.g. 0-7,12")
        places |= set(range(int(first), int(last or first) + 1))
    if not places or max(places) >= num_rows:
        raise ValueError(f"--rows {text!r}: the step has rows 0 to {num_rows - 1}")
    return sorted(places)


def rows_of_step(
    replay: Replay, step: int, places: list[int], *, text: bool
) -> list[dict[str, Any]]:
    """What is known of rows of a step: where they come from, their pairs' documents, their text."""
    phase, dataset = replay.phase_of(step), replay.dataset_of(step)
    masking = Masking(phase.masked_fraction, phase.mask_token_share, phase.random_token_share)
    making = Making(phase.sequence_length, phase.packing, masking, read_mixture(phase.objectives))
    provenance = Provenance(dataset, making)
    numbers = [replay.rows_of(step)[place] for place in places]
    num_lanes = replay.history.config.data.num_lanes
    replay.enter(step, {number % num_lanes for number in numbers})
    found = []
    in_order = sorted(zip(numbers, places, strict=True), key=lambda row: row[0] % num_lanes)
    for number, place in in_order:  # lane by lane: neighbours share a block and its plan
        origin = replay.origin(number)
        row = {"place": place, "row": number, "lane": number % num_lanes, **_facts(dataset, origin)}
        row["pairs"] = [piece._asdict() for piece in provenance.pieces(origin)]
        if text:
            for pair, (a, b) in zip(row["pairs"], provenance.texts(origin), strict=True):
                pair["text_a"], pair["text_b"] = a, b
            row["masked"] = provenance.masked(origin)
        found.append(row)
    _name_documents(dataset, found)
    return sorted(found, key=lambda row: row["place"])


def _facts(dataset: Dataset, origin: Origin) -> dict[str, Any]:
    address = dataset.address_of(origin.block)
    return {
        "source": dataset.sources[int(dataset.blocks[origin.block]["source"])],
        "epoch": origin.epoch,
        "block": origin.block,
        "row_in_block": origin.row,
        "shard": address.shard,
    }


def _name_documents(dataset: Dataset, rows: list[dict[str, Any]]) -> None:
    """Put documents in the place of Places."""
    pairs = [pair for row in rows for pair in row["pairs"]]
    ends = [(pair, end) for pair in pairs for end in ("a", "b") if pair[end] is not None]
    wanted = {(pair[end].block, pair[end].document) for pair, end in ends}
    try:
        known = find_documents(dataset, wanted)
    except FileNotFoundError as error:
        raise ValueError(
            f"what is known of the documents was not copied with the shards: {error}. Copy the dataset's "
            "meta/ folders, too"
        ) from error
    for pair, end in ends:
        place: Place = pair[end]
        document = known[place.block, place.document]
        pair[end] = {**document, "tokens": [place.start, place.stop]}


def check_digest(
    history: RunHistory, datasets: list[Dataset], options: argparse.Namespace
) -> dict[str, Any]:
    """Whether the rows are those that were trained on: the sum of their digests, against what was logged.

    Digests are logged every `log_every` steps, so rows of all steps between two of them are assembled: where
    they are many, or only some rows were asked for, not without --verify.
    """
    first, last, logged = history.logged_span(options.step)
    replay = Replay(history, datasets, first + 1)
    steps = range(first + 1, last + 1)
    num_rows = sum(len(replay.rows_of(step)) for step in steps)
    span = {"first_step": first + 1, "last_step": last, "num_rows": num_rows, "logged": logged}
    if not options.verify and (options.rows or num_rows > MAX_UNASKED):
        return {**span, "verdict": "not compared"}
    num_lanes = history.config.data.num_lanes
    wanted = {
        row % num_lanes for step in steps for row in _any_round(replay.rows_of(step), num_lanes)
    }
    if num_rows > MAX_UNASKED:
        print(f"reading {num_rows:,} rows of steps {first + 1} to {last} ...", file=sys.stderr)
    total = 0
    for step in steps:
        replay.enter(step, wanted)
        total += sum(replay.row(number).digest(number) for number in replay.rows_of(step))
    found = total % (1 << 64)
    return {**span, "found": found, "verdict": "same" if found == logged else "different"}


def _any_round(rows: range, num_lanes: int) -> range:
    """Enough of the rows to have every lane among them."""
    return rows[:num_lanes]


def as_text(report: dict[str, Any]) -> str:
    """For people: where the rows come from, one line for each piece of a pair; then their text."""
    numbers = f"{report['first_row']:,} to {report['first_row'] + report['num_rows'] - 1:,}"
    lines = [
        f"Step {report['step']} of {report['run']}: rows {numbers} of the run, from {report['dataset']}.",
        f"Found from the state at step {report['from_step']}. {digest_text(report['digest'])}",
        "",
    ]
    cells = [
        [
            *(
                str(row[name])
                for name in ("place", "row", "lane", "epoch", "block", "row_in_block")
            ),
            pair["label"],
            *_document_cells(name, pair[name.lower()]),
        ]
        for row in report["rows"]
        for pair in row["pairs"]
        for name in ("A", "B")
        if pair[name.lower()] is not None
    ]
    header = [
        "place", "row", "lane", "epoch", "block", "row of it", "B is", "part", "source", "file", "record",
        "own id", "tokens",
    ]  # fmt: skip
    lines.append(text_table(header, cells))
    if any("text_a" in pair for row in report["rows"] for pair in row["pairs"]):
        lines += ["", f"Text: {LEGEND}"]
    for row in report["rows"]:
        for pair in row["pairs"]:
            if "text_a" in pair:
                lines.append(f"\nplace {row['place']}, row {row['row']}, B is {pair['label']}")
                lines += [f"  A  {pair['text_a']}", f"  B  {pair['text_b']}"]
    return "\n".join(lines)


def _document_cells(name: str, document: dict[str, Any]) -> list[str]:
    start, stop = document["tokens"]
    own_id = "" if document["id"] is None else str(document["id"])
    return [
        name, document["source"], document["file"], str(document["record"]), own_id, f"{start}-{stop}"
    ]  # fmt: skip


def digest_text(checked: dict[str, Any]) -> str:
    """What the comparison says, in a sentence."""
    first, last = checked["first_step"], checked["last_step"]
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    if checked["verdict"] == "same":
        return f"These are the rows that were trained on: their digest over {steps} is what the run logged."
    if checked["verdict"] == "different":
        return (
            f"THESE ARE NOT the rows that were trained on: their digest over {steps} is "
            f"{checked['found']:016x}, the run logged {checked['logged']:016x}. The dataset, the configuration "
            "or a checkpoint was changed."
        )
    return (
        f"Not compared with the logged digest, which is of {checked['num_rows']:,} rows of {steps} "
        "(--verify reads them)."
    )
