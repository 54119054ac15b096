"""Any step of a real run leads back to the documents it was trained on, by the run's folder alone."""

import json
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
from people_support import command
from support import launch, tiny_preset

from data.manifest import sealed
from launcher import blame

PHASES = [
    {"first_step": 3, "global_batch_size": 32},
    {"first_step": 5, "sequence_length": 32, "micro_batch_size": 8},
    {"first_step": 7, "weights": {"first": 1, "second": 2}},
]
MARK = re.compile(r"\[(?:MASK:|=)([^\]]*)\]")  # its group: the word that stood there
# characters that are several tokens, or that the marks are made of, in the place of a word
UNCLEAR = re.compile(r"<0x|\ufffd|\[(?!MASK:|=)|\[=?\]")


@pytest.fixture(scope="module")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps in four phases; checkpoints of steps 6, 8 and 10 are kept."""
    folder = tmp_path_factory.mktemp("trained")
    preset = tiny_preset(folder, tiny_dataset, steps=10, phases=PHASES, save_every=2)
    result = launch(preset)
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def reported(capsys, *arguments: object) -> tuple[int, dict]:
    status = command(blame, *arguments, "--json")
    return status, json.loads(capsys.readouterr().out)


def plain(text: str) -> str:
    """Without white space, in compatibility forms."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def keep_logged(run: Path, *steps: int) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["step"] in steps))


@pytest.mark.parametrize("step", range(1, 11))
def test_the_rows_of_every_step_are_those_that_were_trained_on(
    step: int, trained: Path, capsys
) -> None:
    """By the digest that the run logged; from the start, within phases, over their borders."""
    status, report = reported(capsys, trained, step)
    assert status == 0 and report["digest"]["verdict"] == "same"
    assert report["digest"]["first_step"] == report["digest"]["last_step"] == step
    assert report["from_step"] == max(s for s in (0, 6, 8, 10) if s < step)
    assert report["num_rows"] == len(report["rows"]) == (16 if step <= 3 else 32)
    assert [row["row"] for row in report["rows"]] == list(
        range(report["first_row"], report["first_row"] + report["num_rows"])
    )


@pytest.mark.parametrize("step", [2, 6, 10])
def test_documents_hold_the_text_that_is_shown(
    step: int, trained: Path, tiny_dataset: Path, capsys
) -> None:
    """Looked up in the files that the dataset was made from."""
    _, report = reported(capsys, trained, step, "--text")
    lines = {
        name: (tiny_dataset.parent / f"{name}.jsonl").read_text().split("\n")
        for name in ("first", "second")
    }
    labels, num_compared = set(), 0
    for pair in (pair for row in report["rows"] for pair in row["pairs"]):
        labels.add(pair["label"])
        for part in "ab":
            document, shown = pair[part], pair[f"text_{part}"]
            if document is None:
                assert pair["label"] == "none" and shown == ""
                continue
            assert document["file"] == f"{document['source']}.jsonl"
            original = json.loads(lines[document["source"]][document["record"]])
            assert document["id"] == original["id"]
            if not UNCLEAR.search(shown):
                num_compared += 1
                assert plain(MARK.sub(r"\1", shown).replace("▁", " ")) in plain(original["text"])
        if pair["label"] == "next":
            assert pair["a"]["document_id"] == pair["b"]["document_id"]
            assert pair["a"]["tokens"][1] == pair["b"]["tokens"][0]
        elif pair["label"] == "random":
            assert pair["a"]["document_id"] != pair["b"]["document_id"]
    assert labels >= {"next", "random"} and num_compared > 10
    masked = [entry for row in report["rows"] for entry in row["masked"]]
    hidden = sum(entry["shown"] == "[MASK]" for entry in masked) / len(masked)
    assert len(masked) > 100 and 0.6 < hidden < 0.95


def test_some_rows_as_text_for_people(trained: Path, capsys) -> None:
    assert command(blame, trained, 9, "--rows", "0-2,7", "--text", "--verify") == 0
    text = capsys.readouterr().out
    assert "These are the rows that were trained on" in text and "state at step 8" in text
    assert set(re.findall(r"^place (\d+), row \d+, B is \w+$", text, re.MULTILINE)) == set("0127")
    assert re.search(r"(first|second)\.jsonl +\d+ +doc\d+", text)
    assert "[MASK:" in text
    assert command(blame, trained, 9, "--rows", "3") == 0
    assert "Not compared with the logged digest" in capsys.readouterr().out


def test_digests_that_were_logged_for_many_steps_at_once(copied: Path, capsys) -> None:
    shutil.rmtree(copied / "checkpoints")
    keep_logged(copied, 2, 10)
    status, report = reported(capsys, copied, 8)
    assert status == 0 and report["digest"]["verdict"] == "same"
    assert (report["digest"]["first_step"], report["digest"]["last_step"]) == (3, 10)


def test_a_change_since_is_seen_in_the_digest(copied: Path, capsys) -> None:
    path = copied / "config.yaml"
    path.write_text(path.read_text().replace("\nseed: 1\n", "\nseed: 2\n"))
    status, report = reported(capsys, copied, 4)
    assert status == 1 and report["digest"]["verdict"] == "different"
    assert command(blame, copied, 4) == 1
    assert "THESE ARE NOT the rows that were trained on" in capsys.readouterr().out


def test_blocks_that_the_run_passed_over_are_passed_over_again(
    copied: Path, tiny_dataset: Path, capsys
) -> None:
    """The ledger decides, not the block: with a line that this run never wrote, a lane has other rows."""
    _, before = reported(capsys, copied, 2)
    lane = before["rows"][5]
    entry = {"lane": lane["lane"], "window": 0, "block": lane["block"]}
    (copied / "damaged_blocks.jsonl").write_text(json.dumps(entry) + "\n")
    status, after = reported(capsys, copied, 2)
    assert status == 1 and after["digest"]["verdict"] == "different"
    changed = [b["place"] for b, a in zip(before["rows"], after["rows"], strict=True) if a != b]
    assert changed == [5] and after["rows"][5]["block"] != lane["block"]


def test_a_dataset_that_was_moved_or_changed(copied: Path, tiny_dataset: Path, capsys) -> None:
    path, moved = copied / "config.yaml", copied.parent / "moved"
    path.write_text(path.read_text().replace(str(tiny_dataset), "datasets/gone"))
    with pytest.raises(ValueError, match="not at datasets/gone: if it was moved"):
        command(blame, copied, 9)
    shutil.copytree(tiny_dataset, moved)
    status, report = reported(capsys, copied, 9, "--dataset", moved)
    assert status == 0 and report["dataset"] == str(moved)
    manifest = moved / "manifest.json"
    manifest.write_text(json.dumps(sealed({**json.loads(manifest.read_text()), "seed": 2})))
    with pytest.raises(ValueError, match="it was changed since, prepared anew, or is another one"):
        command(blame, copied, 9, "--dataset", moved)
    manifest.write_bytes((tiny_dataset / "manifest.json").read_bytes())
    shutil.rmtree(moved / "first" / "meta")
    shutil.rmtree(moved / "second" / "meta")
    with pytest.raises(ValueError, match="Copy the dataset's meta/ folders, too"):
        command(blame, copied, 9, "--dataset", moved)


def test_what_cannot_be_answered_is_told(copied: Path, tmp_path: Path) -> None:
    for step in (0, 11):
        with pytest.raises(ValueError, match=f"step {step} is not in .* ends with step 10"):
            command(blame, copied, step)
    for rows in ("32", "a", "3-", "5-2"):
        with pytest.raises(ValueError, match=f"--rows '{rows}'"):
            command(blame, copied, 9, "--rows", rows)
    with pytest.raises(ValueError, match=r"is no run: it has no config\.yaml"):
        command(blame, tmp_path, 1)
    state = copied / "checkpoints" / "step-00000008" / "state.json"
    state.write_text(state.read_text().replace('"row": ', '"row":  '))
    with pytest.raises(ValueError, match="is damaged: move this checkpoint away"):
        command(blame, copied, 9)
