"""Recipes carried out by real processes: stopped, repeated, on Ray; what stays, what goes, and why."""

import gzip
import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from corpus_support import CORPORA, corpora
from support import ROOT, environment

from data.corpus.output import read_documents
from data.corpus.readers import read_file
from data.corpus.recipe import SourceConfig, load_recipe
from data.corpus.run import run_recipe

RUN = [sys.executable, "-m", "launcher.cli", "corpus"]
STEPS = [
    "normalise",
    "remove_boilerplate",
    {"identify_language": {"languages": ["en", "zh"]}},
    "quality",
]
NOUNS = "river valley market house bridge field road town forest hill ship garden school letter window".split()  # noqa: SIM905
VERBS = "reached crossed followed left found saw built kept held passed covered watched opened served".split()  # noqa: SIM905
ADJECTIVES = "old small quiet broad narrow green distant wooden early bright heavy famous open northern".split()  # noqa: SIM905
CHINESE = (
    "这条河发源于北方的山地，流经许多村庄和田野，最后注入大海。每年春天，河水都会上涨，淹没两岸的低地。"
    "当地的人们因此把房屋建在较高的地方，并且种植水稻和小麦。他们的生活十分简单，但是很有秩序。"
    "到了秋天，商人从南方带来布匹和食盐，在镇上的集市里交换粮食。孩子们跟着老人学习写字和算术。"
    "山水相连，路途遥远，所以很少有人离开家乡去别的城市工作。"
)


def story(number: int) -> str:
    """Running text that is like no other: thirty sentences of common words."""
    draw = random.Random(number)

    def thing() -> str:
        return f"the {draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}"

    sentences = [
        f"{thing().capitalize()} {draw.choice(VERBS)} {thing()} of {thing()}, and it was with {thing()} "
        f"that they {draw.choice(VERBS)} {thing()} in the end."
        for _ in range(30)
    ]
    return " ".join(sentences)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Four files of two sources, with copies, noise, another language and a broken line."""
    folder = tmp_path / "raw"
    folder.mkdir()
    lines = [{"id": f"a{n}", "text": story(n)} for n in range(30)]
    lines += [{"text": story(3)}, {"text": "click here " * 4}, {"text": "x7 # 9 ~ " * 40}]
    (folder / "a.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + "{broken\n"
    )
    second = [{"text": story(n)} for n in range(100, 115)] + [{"text": story(5)}]
    (folder / "b.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(line) + "\n" for line in second).encode())
    )
    (folder / "c.txt").write_bytes(CHINESE.encode("gb18030"))
    (folder / "d.txt").write_text(
        "Der Fluss entspringt im Gebirge und fließt durch viele Dörfer. " * 20
    )
    return folder


def recipe_file(folder: Path, raw: Path, **changes: Any) -> Path:
    values = {
        "output": str(folder / "out"),
        "sources": {
            "en": [f"{raw}/a.jsonl", f"{raw}/b.jsonl.gz"],
            "more": [f"{raw}/c.txt", f"{raw}/d.txt"],
        },
        "steps": STEPS,
        "dedup": {"exact": True, "near": True},
        "executor": {"kind": "local", "workers": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}, allow_unicode=True))
    return path


def run(*arguments: object, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *map(str, arguments)], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip


def contents(output: Path) -> dict[str, bytes]:
    """Every file that a user sees, but for the recipe's own paths."""
    files = [
        p for name in ("documents", "dropped") for p in (output / name).rglob("*") if p.is_file()
    ]
    files += [output / f"report.{kind}" for kind in ("json", "md", "html")]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def documents(output: Path, folder: str = "documents") -> list[dict[str, Any]]:
    return [
        row for path in sorted((output / folder).rglob("*.zst")) for row in read_documents(path)
    ]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe carried out by two processes; its folder."""
    folder = tmp_path_factory.mktemp("corpus")
    result = run(recipe_file(folder, raw.__wrapped__(folder)))  # pyright: ignore[reportFunctionMemberAccess]
    assert result.returncode == 0, result.stderr
    assert "documents read" in result.stdout
    return folder


def test_what_stays_and_what_goes(done: Path) -> None:
    kept, dropped = documents(done / "out"), documents(done / "out", "dropped")
    ids = [row["id"] for row in kept]
    assert len(ids) == len(set(ids))
    assert len(set(ids) & {f"a.jsonl#{n}" for n in range(30)}) >= 28  # few are taken for Latin
    why = {row["id"]: (row["step"], row["reason"]) for row in dropped}
    assert why["a.jsonl#30"] == ("copies", "exact") and why["b.jsonl.gz#15"] == ("copies", "exact")
    assert why["a.jsonl#33"] == ("read", "unreadable_record")
    assert why["d.txt#0"] == ("identify_language", "other_language")
    assert {why["a.jsonl#31"][0], why["a.jsonl#32"][0]} <= {"quality", "identify_language"}
    (chinese,) = [row for row in kept if row["id"] == "c.txt#0"]
    assert "山水相连" in chinese["text"] and chinese["encoding"] == "gb18030"
    assert len(kept) + len(dropped) == 30 + 3 + 1 + 16 + 2  # nothing is lost
    assert kept[0]["own_id"] == "a0" and kept[0]["language"] == "en"


def test_the_report_tells_the_same(done: Path) -> None:
    report = json.loads((done / "out" / "report.json").read_text())
    kept, dropped = documents(done / "out"), documents(done / "out", "dropped")
    total = report["total"]
    assert (total["kept_documents"], total["read_documents"]) == (
        len(kept),
        len(kept) + len(dropped),
    )
    assert total["kept_bytes"] == sum(len(row["text"].encode()) for row in kept)
    told = {(s["step"], reason): n for s in total["steps"] for reason, n in s["dropped"].items()}
    assert told == Counter((row["step"], row["reason"]) for row in dropped)
    assert sum(report["lengths"].values()) == len(kept)
    page = (done / "out" / "report.html").read_text()
    assert "<svg" in page and "src=" not in page and "http" not in page.replace("http-equiv", "")
    assert "&quot;" in page or "&#x27;" in page or "<script" not in page


def test_again_changes_nothing_and_another_recipe_is_refused(done: Path) -> None:
    before = contents(done / "out")
    assert run(done / "recipe.yaml", "executor.workers=1").returncode == 0
    assert contents(done / "out") == before
    refused = run(done / "recipe.yaml", "dedup.near=false")
    assert refused.returncode == 78
    assert "recipe dedup: " in refused.stderr and "made from something else" in refused.stderr


def test_one_worker_gives_the_same_bytes(done: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((done / "recipe.yaml").read_text())
    values |= {"output": str(tmp_path / "out"), "executor": {"kind": "local", "workers": 1}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert run(tmp_path / "recipe.yaml").returncode == 0
    assert contents(tmp_path / "out") == contents(done / "out")


def test_ray_gives_the_same_bytes(done: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'cloze[ray]'")
    values = yaml.safe_load((done / "recipe.yaml").read_text())
    values |= {
        "output": str(tmp_path / "out"),
        "executor": {"kind": "ray", "workers": 2, "mem_per_cpu_gb": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    result = run(tmp_path / "recipe.yaml", timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    assert contents(tmp_path / "out") == contents(done / "out")


def test_killed_on_the_way_and_started_again(done: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((done / "recipe.yaml").read_text())
    values["output"] = str(tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    for stage in ("clean", "match"):
        completions = tmp_path / "out" / ".work" / "logs" / stage / "completions"
        process = subprocess.Popen(
            [*RUN, str(tmp_path / "recipe.yaml")], cwd=ROOT, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if completions.is_dir() and any(completions.iterdir()):
                break
            time.sleep(0.005)
        assert process.poll() is None, "it ended unkilled"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out" / "report.html").exists()
    assert run(tmp_path / "recipe.yaml").returncode == 0
    assert contents(tmp_path / "out") == contents(done / "out")


def test_a_job_that_slurm_refuses(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it asks for more memory than a node has: no traceback, but what to change."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: Memory' >&2\nexit 1\n")
    (tools / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    path = recipe_file(tmp_path, raw, executor={"kind": "slurm", "workers": 3, "partition": "main"})
    with pytest.raises(ValueError, match=r"sbatch did not take a job .*executor\.mem_per_cpu_gb"):
        run_recipe(load_recipe(path, []))


def test_slurm_scripts(raw: Path, tmp_path: Path) -> None:
    """Without Slurm: an array as long as there are tasks, sound shell, the Python of now."""
    path = recipe_file(
        tmp_path,
        raw,
        executor={"kind": "slurm", "workers": 3, "partition": "long", "sbatch": {"account": "lab"}},
    )
    assert run_recipe(load_recipe(path, []), dry_run=True) is None
    scripts = sorted((tmp_path / "out" / ".work" / "logs").rglob("launch_script.slurm"))
    assert [path.parent.name for path in scripts] == [
        "clean",
        "cluster",
        "match",
        "publish",
        "report",
    ]
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
    text = scripts[0].read_text()
    for line in ("--array=0-3%3", "--partition=long", "--account=lab", "--requeue"):
        assert f"#SBATCH {line}" in text
    assert str(Path(sys.executable).parent) in text and str(ROOT) in text


FAKE_SBATCH = """#!/bin/bash
# Runs the elements of the array at once, one after the other, as srun would; prints a job id.
script="${@: -1}"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
grep -q merge_stats "$script" && { echo "Submitted batch job 7"; exit 0; }
for ((i = 0; i <= last; i++)); do
  SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=localhost RUN_OFFSET=0 bash "$script" >> "$FAKE_LOG" 2>&1 || exit 1
done
echo "Submitted batch job 42"
"""


def test_the_slurm_executor_does_the_work(done: Path, tmp_path: Path) -> None:
    """With stand-ins for sbatch and srun that run the very scripts here: the same bytes."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(FAKE_SBATCH)
    (tools / "srun").write_text(
        '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n'
    )
    (tools / "scontrol").write_text("#!/bin/bash\necho localhost\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    values = yaml.safe_load((done / "recipe.yaml").read_text())
    values |= {"output": str(tmp_path / "out"), "executor": {"kind": "slurm", "workers": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    variables = environment() | {
        "PATH": f"{tools}:{os.environ['PATH']}", "FAKE_LOG": str(tmp_path / "slurm.log"),
    }  # fmt: skip
    result = subprocess.run(
        [*RUN, str(tmp_path / "recipe.yaml")], cwd=ROOT, env=variables, capture_output=True, text=True,
        timeout=400, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert contents(tmp_path / "out") == contents(done / "out")


def test_all_problems_of_a_recipe_at_once(tmp_path: Path) -> None:
    values = {
        "sources": {"Web!": "x.txt", "b": {"files": "y.txt", "colour": 1}},
        "steps": ["normalize", {"quality": {"spaced": {"nonsense": 3}}}, "mask_pii", "mask_pii"],
        "dedup": {"near": {"threshold": 2.0}},
        "executor": {"kind": "spark"},
        "outputs": "x",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError) as error:
        load_recipe(path, [])
    for part in (
        "unknown key outputs", "missing: output", "sources.Web!", "unknown key sources.b.colour", "'normalize'",
        "nonsense", "occur more than once", "near.threshold 2.0", "executor.kind is 'spark'",
    ):  # fmt: skip
        assert part in str(error.value)


def test_files_that_are_not_there_are_named(raw: Path, tmp_path: Path) -> None:
    path = recipe_file(
        tmp_path, raw, sources={"a": [f"{raw}/nothing*.jsonl"], "b": [f"{tmp_path}/recipe.yaml"]}
    )
    result = run(path)
    assert result.returncode == 78
    assert "nothing*.jsonl" in result.stderr and "unknown suffix" in result.stderr


def test_problems_can_stop_a_run(raw: Path, tmp_path: Path) -> None:
    result = run(recipe_file(tmp_path, raw, stop_on_problems=True))
    assert result.returncode == 78 and "unreadable_record" in result.stderr


def test_a_tar_of_samples_and_html(tmp_path: Path) -> None:
    """WebDataset samples of text; a page's main text."""
    folder = tmp_path / "raw"
    folder.mkdir()
    with tarfile.open(folder / "s.tar", "w") as archive:
        for name, data in (
            ("x/1.txt", story(1).encode()), ("x/1.cls", b"0"),
            ("x/2.json", json.dumps({"text": story(2)}).encode()),
            ("x/3.json", b"{}"), ("__index__", b""), ("x/4.txt", story(4).encode("utf-16")),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    paragraphs = "".join(f"<p>{story(n)}</p>" for n in (8, 9))
    menu = "<nav><a href=/>Home</a> <a href=/x>News</a></nav>"
    page = f"<html><body>{menu}<article>{paragraphs}</article></body></html>"
    (folder / "p.html").write_text(page)
    path = recipe_file(
        tmp_path, folder, sources={"mixed": str(folder)}, steps=["normalise"], dedup=False
    )
    assert run(path).returncode == 0
    kept = {row["id"]: row for row in documents(tmp_path / "out")}
    assert set(kept) == {"s.tar#0", "s.tar#1", "s.tar#3", "p.html#0"}
    assert kept["s.tar#3"]["text"] == story(4) and kept["s.tar#1"]["own_id"] == "x/2"
    assert story(8)[:200] in kept["p.html#0"]["text"] and "News" not in kept["p.html#0"]["text"]
    (lost,) = documents(tmp_path / "out", "dropped")
    assert (lost["id"], lost["reason"]) == ("s.tar#2", "unreadable_record")


def test_an_archive_that_was_cut_off(tmp_path: Path) -> None:
    """Everything before the cut is read; the cut itself is reported."""
    page = (
        "<html><body><article>"
        + "".join(f"<p>{story(n)}</p>" for n in range(4))
        + "</article></body></html>"
    )
    body = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=no-such\r\n\r\n{page}".encode()
    record = (
        b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.example/\r\n"
        b"WARC-Date: 2024-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
        b"Content-Type: application/http; msgtype=response\r\n"
        b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body + b"\r\n\r\n"
    )
    path = tmp_path / "a.warc"
    path.write_bytes(record * 2 + record[: len(record) // 2])
    found = list(read_file(str(path), SourceConfig((str(path),))))
    assert [raw.reason for raw in found] == [None, None, "cut_off_record"]
    assert story(1) in (found[0].text or "") and found[0].metadata["url"] == "http://a.example/"
    whole = gzip.compress(record * 2)
    path = tmp_path / "b.warc.gz"
    path.write_bytes(whole[: len(whole) - 100])
    *_, last = read_file(str(path), SourceConfig((str(path),)))
    assert last.text is None and last.reason in (
        "damaged_archive",
        "damaged_file",
        "cut_off_record",
    )


def test_the_output_can_be_prepared(done: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "prepare", str(tmp_path / "dataset"),
         f"en={done / 'out' / 'documents' / 'en'}", "--vocab-size", "300",
         "--block-tokens", "4096", "--heldout-fraction", "0.1"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "dataset" / "manifest.json").read_text())
    source = manifest["sources"]["en"]
    assert sum(source[split]["num_documents"] for split in ("train", "heldout")) == len(
        documents(done / "out" / "documents", "en")
    )


def test_every_messy_file_goes_through(tmp_path: Path) -> None:
    """Broken archives, mixed encodings, mojibake, naughty strings: nothing crashes, all is accounted for."""
    corpora("messy")
    messy = CORPORA / "messy"
    sources = {
        "mix": {"files": str(messy / "dirty_mix.jsonl.xz"), "label_field": "defect"},
        "damaged": [str(messy / name) for name in ("mojibake_zh.jsonl.xz", "encodings.tar.xz")],
        "archives": str(messy / "warc"),
        "pages": {"files": str(messy / "web_html.jsonl.xz"), "html": True, "text_field": "html"},
        "strings": {"files": str(messy / "blns.txt"), "txt_documents": "blank_line"},
        "markdown": str(messy / "raw_markdown_zh.jsonl.xz"),
        "pii": str(messy / "pii_synthetic_en.jsonl.xz"),
        "languages": str(messy / "langid_udhr.jsonl.xz"),
        "copies": [str(messy / f"near_dup_{name}.jsonl.xz") for name in ("en", "zh")]
        + [str(messy / "licences_en.jsonl.xz")],
    }
    steps = ["repair_mojibake", "normalise", "remove_markup", "remove_boilerplate",
             {"identify_language": {"languages": ["en", "zh"]}}, "quality", "mask_pii"]  # fmt: skip
    truth = {"mojibake": "repair_mojibake", "html_left": "remove_markup",
             "boilerplate": "remove_boilerplate", "repeat_lines": "remove_boilerplate", "pii": "mask_pii",
             "other_lang": "identify_language", "gibberish": "identify_language",
             "numbers": "identify_language", "empty": "normalise"}  # fmt: skip
    path = recipe_file(tmp_path, messy, sources=sources, steps=steps, truth=truth)
    result = run(path, timeout=580)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    kept, dropped = documents(tmp_path / "out"), documents(tmp_path / "out", "dropped")
    assert report["total"]["read_documents"] == len(kept) + len(dropped)
    lost = {row["id"] for row in dropped if row["step"] == "read"}
    # Archives whose gzip members are cut wrongly hold whole pages all the same.
    assert not [name for name in lost if "warc" in name]
    pages = {row["id"]: row["text"] for row in [*kept, *dropped] if row["source"] == "archives"}
    assert pages["example-wrong-chunks.warc.gz#0"] == pages["example.warc#2"]
    assert pages["example-bad-non-chunked.warc.gz#2"] == pages["example.warc#2"]
    labels = report["labels"]
    clean = labels["none"]
    copies = sum(n for outcome, n in clean.items() if outcome.startswith("dropped by copies"))
    others = sum(n for outcome, n in clean.items() if "dropped" in outcome) - copies
    assert others <= 0.02 * sum(clean.values())  # but for their copies, clean documents stay
    passed = sum(n for outcome, n in labels["mojibake"].items() if outcome == "kept")
    assert passed == 0
    for step, found in report["truth"].items():
        assert found["recall"] >= 0.95, (step, found)
        if step != "normalise":  # it changes sound text, too
            assert found["precision"] >= 0.8, (step, found)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in page and page.count("<svg") >= 3
