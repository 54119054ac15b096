"""A size in, a table out: `cloze prepare` on that much text, killed twice and more, within bounded memory.

    python tests/soak/prepare_20gb.py --gb 20 --folder /scratch/soak

Writes text of Zipf-distributed words (English-like and Chinese-like, the same for the same arguments), runs
prepare with two processes, kills the whole group with SIGKILL at a third and two thirds of the tasks and once
while shards are written, starts it again with the same command, and checks the dataset. The disk needs 2.3
times the text: the text, the spill files (0.7) until the end, and the shards (0.6).
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import zstandard

ROOT = Path(__file__).resolve().parent.parent.parent
DISK_PER_TEXT_BYTE = 2.3
FILE_BYTES = 256 << 20
CHUNK_WORDS = 1 << 20
SEED = 2024
KILL_AT = (1 / 3, 2 / 3)  # of the encoding tasks
IN_SHARDS = 2.0  # instead of a share: kill when a shard is written
POLL_SECONDS = 0.2
SYLLABLE_ONSETS = (
    "br",
    "ch",
    "cl",
    "cr",
    "dr",
    "fl",
    "gr",
    "pl",
    "pr",
    "sh",
    "st",
    "str",
    "th",
    "tr",
    "wh",
)
SYLLABLE_VOWELS = ("ai", "ea", "ee", "ie", "oa", "oo", "ou")
START, MIDDLE, END, LINE_END, LAST = range(5)  # forms of a word: where it stands
LAST_ENGLISH, LAST_CHINESE = '."}\n{"text": "', '。"}\n{"text": "'


def english_forms() -> list[list[bytes]]:
    """Form -> each of 60,000 words in it."""
    rng = np.random.default_rng(SEED)
    onsets = [*"bcdfghjklmnprstvwz", *SYLLABLE_ONSETS]
    vowels = [*"aeiou", *SYLLABLE_VOWELS]
    codas = ["", "", "n", "r", "s", "t", "l", "d", "ng", "nd", "st", "ck", "m", "p"]
    words: dict[str, None] = {}
    while len(words) < 60_000:
        count = 1 + int(rng.integers(3)) if len(words) > 200 else 1
        parts = [onsets, vowels, codas] * count
        words["".join(part[int(rng.integers(len(part)))] for part in parts)] = None
    plain = list(words)
    ends = (" ", " ", ". ", ".\\n", LAST_ENGLISH)
    return [
        [((w.capitalize() if form == START else w) + end).encode() for w in plain]
        for form, end in enumerate(ends)
    ]


def chinese_forms() -> list[list[bytes]]:
    """Form -> each of 20,000 words of one to four Han characters in it."""
    rng = np.random.default_rng(SEED + 1)
    ranks = np.arange(1, 3501)
    characters = rng.permutation(np.arange(0x4E00, 0x4E00 + 6000))[:3500]
    weights = 1 / ranks / (1 / ranks).sum()
    words: dict[str, None] = {}
    while len(words) < 20_000:
        count = 1 + int(rng.choice(4, p=[0.15, 0.6, 0.15, 0.1]))
        words["".join(map(chr, rng.choice(characters, count, p=weights)))] = None
    plain = list(words)
    ends = ("", "", "。", "。\\n", LAST_CHINESE)
    middle = ["，" if number % 11 == 0 else "" for number in range(len(plain))]
    return [
        [
            (w + (extra if form == MIDDLE else end)).encode()
            for w, extra in zip(plain, middle, strict=True)
        ]
        for form, end in enumerate(ends)
    ]


def write_text(task: tuple[str, str, int, int]) -> tuple[str, int, int]:
    """(path, documents, bytes) of one .jsonl file of about so many bytes."""
    kind, path, number, nbytes = task
    forms = english_forms() if kind == "en" else chinese_forms()
    table = [word for form in forms for word in form]
    sizes = np.array([len(word) for word in table])
    starts = np.cumsum(sizes) - sizes
    letters = np.frombuffer(b"".join(table), np.uint8)
    num_words = len(forms[0])
    share = 1 / (np.arange(num_words) + 2.7)
    bounds = np.cumsum(share / share.sum())
    rng = np.random.default_rng([SEED, ord(kind[0]), number])
    written = num_documents = 0
    with open(path, "wb", buffering=1 << 20) as file:
        written += file.write(b'{"text": "')
        while written < nbytes:
            words = np.searchsorted(bounds, rng.random(CHUNK_WORDS))
            rows = np.minimum(words, num_words - 1) + num_words * _word_forms(rng)
            total = int(sizes[rows].sum())
            ends = np.cumsum(sizes[rows])
            place = np.repeat(starts[rows] - (ends - sizes[rows]), sizes[rows]) + np.arange(total)
            written += file.write(letters[place].data)
            num_documents += int((rows >= num_words * LAST).sum())
        file.truncate(file.tell() - len(b'{"text": "'))  # every chunk ends with a document's end
    return path, num_documents, os.path.getsize(path)


def _word_forms(rng: np.random.Generator) -> np.ndarray:
    """Sentences of 4 to 30 words, lines of some sentences, documents of some lines; the last ends one."""
    forms = np.full(CHUNK_WORDS, MIDDLE)
    ends = np.cumsum(rng.integers(4, 31, CHUNK_WORDS // 4))
    ends = np.append(ends[ends < CHUNK_WORDS - 1], CHUNK_WORDS - 1)
    kinds = rng.random(len(ends))
    forms[ends] = np.where(kinds < 0.75, END, np.where(kinds < 0.95, LINE_END, LAST))
    forms[-1] = LAST
    begins = np.append(0, ends[:-1] + 1)
    forms[begins[forms[begins] == MIDDLE]] = START
    return forms


def make_corpus(folder: Path, gigabytes: float) -> dict[str, int]:
    """Source -> documents. Two thirds English-like. Not made again if it is there."""
    facts = folder / f"corpus-{gigabytes}.json"
    if facts.is_file():
        return json.loads(facts.read_text())["documents"]
    tasks = []
    for kind, share in (("en", 2 / 3), ("zh", 1 / 3)):
        (folder / "text" / kind).mkdir(parents=True, exist_ok=True)
        nbytes = int(gigabytes * 1e9 * share)
        count = max(2, math.ceil(nbytes / FILE_BYTES))
        tasks += [
            (kind, str(folder / "text" / kind / f"{n:04d}.jsonl"), n, nbytes // count)
            for n in range(count)
        ]
    documents = {"en": 0, "zh": 0}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for path, count, _ in pool.imap_unordered(write_text, tasks):
            documents[Path(path).parent.name] += count
    facts.write_text(json.dumps({"documents": documents}))
    return documents


def command(folder: Path, processes: int) -> list[str]:
    sources = [f"{kind}={folder}/text/{kind}" for kind in ("en", "zh")]
    options = ["--processes", str(processes), "--vocab-size", "16384"]
    return [
        sys.executable,
        "-m",
        "launcher.cli",
        "prepare",
        str(folder / "dataset"),
        *sources,
        *options,
    ]


class Memory:
    """Peak resident memory, in MiB, of the processes of a session: the first one, and each of the others."""

    def __init__(self) -> None:
        self.main = self.worker = 0.0

    def look(self, session: int) -> None:
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(path.read_text().rsplit(")", 1)[1].split()[3]) != session:
                    continue
                lines = (path.parent / "status").read_text().splitlines()
            except OSError:
                continue
            peak = next(
                (int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0
            )
            if int(path.parent.name) == session:
                self.main = max(self.main, peak)
            else:
                self.worker = max(self.worker, peak)


def progress(dataset: Path, num_parts: int) -> tuple[float, int]:
    """(share of the encoding tasks that are done, shards that are written)."""
    done = len(list((dataset / ".work" / "spill").glob("*.json")))
    return done / num_parts, len(list((dataset / ".work" / "shards").glob("*[0-9].json")))


def run_until(
    folder: Path, processes: int, memory: Memory, stop: float | None, num_parts: int
) -> bool:
    """One run; killed when `stop` of the encoding is done (above 1: when a shard is). Whether it ended."""
    log = open(folder / "prepare.log", "ab")  # noqa: SIM115  closed below
    process = subprocess.Popen(
        command(folder, processes), cwd=ROOT, stdout=log, stderr=log, start_new_session=True
    )
    while process.poll() is None:
        memory.look(process.pid)
        share, num_shards = progress(folder / "dataset", num_parts)
        if stop is not None and (share >= stop or (stop == IN_SHARDS and num_shards > 0)):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
        time.sleep(POLL_SECONDS)
    log.close()
    if process.returncode != 0:
        sys.exit(f"prepare ended with {process.returncode}: see {folder / 'prepare.log'}")
    return True


def check(folder: Path, documents: dict[str, int]) -> list[str]:
    """What is wrong with the counts of the finished dataset."""
    sys.path.insert(0, str(ROOT))
    from data.sentences import sentence_ends
    from data.shards import SPLITS, Dataset
    from data.vocab import Tokenizer

    dataset = Dataset.open(folder / "dataset")
    tokenizer = Tokenizer.load(folder / "dataset" / "tokenizer")
    problems = []
    for source, expected in documents.items():
        held = [dataset.manifest["sources"][source][split] for split in SPLITS]
        if (found := sum(part["num_documents"] for part in held)) != expected:
            problems.append(f"{source}: {expected:,} documents went in, {found:,} came out")
        name = "0000.jsonl"
        metas = (folder / "dataset" / source / "meta").iterdir()
        stored = sum(_tokens_of_file(path, name) for path in metas)
        direct = 0
        with open(folder / "text" / source / name, encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                direct += len(tokenizer.encode(text, sentence_ends(text)).ids)
        if stored != direct:
            problems.append(
                f"{source}/{name}: {direct:,} tokens by itself, {stored:,} in the dataset"
            )
    return problems


def _tokens_of_file(meta: Path, name: str) -> int:
    with open(meta, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        entries = (json.loads(line) for line in io.BufferedReader(stream))  # pyright: ignore[reportArgumentType]
        return sum(entry["num_tokens"] for entry in entries if entry["file"] == name)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=20.0, help="of text, in 10^9 bytes")
    parser.add_argument("--folder", type=Path, required=True, help="empty, or that of a run before")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave text and dataset there")
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = options.gb * 1e9 * DISK_PER_TEXT_BYTE, shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(f"{folder} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed")
    seconds: dict[str, float] = {}
    begun = time.monotonic()
    documents = make_corpus(folder, options.gb)
    seconds["writing text"] = time.monotonic() - begun
    memory = Memory()
    num_kills = prepare_with_kills(folder, options.processes, memory, seconds)
    begun = time.monotonic()
    verify = [sys.executable, "-c", VERIFY, "verify", str(folder / "dataset")]
    verified = subprocess.run(
        [*verify, "--processes", str(options.processes)], cwd=ROOT, check=False
    )
    seconds["verify"] = time.monotonic() - begun
    problems = check(folder, documents)
    if verified.returncode != 0:
        problems.append("the dataset is damaged")
    if num_kills < len(KILL_AT):
        problems.append("it ended before it could be killed: give more text")
    print_table(folder, documents, seconds, options.processes)
    print(f"{'kills (SIGKILL, group)':<28}{num_kills:>12}")
    print(f"{'peak memory, main/worker':<28}{memory.main:>12,.0f} {memory.worker:,.0f} MiB")
    print("FAILED: " + "; ".join(problems) if problems else "passed: documents and tokens agree")
    if not options.keep:
        shutil.rmtree(folder / "text")
        shutil.rmtree(folder / "dataset")
        next(folder.glob("corpus-*.json")).unlink()
    return int(bool(problems))


def prepare_with_kills(
    folder: Path, processes: int, memory: Memory, seconds: dict[str, float]
) -> int:
    """Run it to its end; how often it was killed on the way."""
    sizes = [path.stat().st_size for path in (folder / "text").rglob("*.jsonl")]
    part_bytes = max(8 << 20, math.ceil(sum(sizes) / 4096))  # as data/stages.py parts the files
    num_parts = sum(math.ceil(size / part_bytes) for size in sizes)
    shutil.rmtree(folder / "dataset", ignore_errors=True)
    num_kills = 0
    begun = time.monotonic()
    for stop in (*KILL_AT, IN_SHARDS, None):
        ended = run_until(folder, processes, memory, stop, num_parts)
        num_kills += not ended
        where = (
            "while shards were written"
            if stop == IN_SHARDS
            else f"at {stop:.2f} of encoding"
            if stop
            else ""
        )
        print(
            f"{'finished' if ended else f'killed {where}'} after {time.monotonic() - begun:.0f} s",
            flush=True,
        )
        if ended:
            break
    seconds["prepare, kills and all"] = time.monotonic() - begun
    return num_kills


def print_table(
    folder: Path, documents: dict[str, int], seconds: dict[str, float], processes: int
) -> None:
    sizes = [path.stat().st_size for path in (folder / "text").rglob("*.jsonl")]
    megabytes = sum(sizes) / 1e6
    total = sum(documents.values())
    print(f"\n{'text':<28}{megabytes:>12,.0f} MB in {len(sizes)} files, {total:,} documents")
    for name, value in seconds.items():
        print(f"{name:<28}{value:>12,.1f} s")
    rate = megabytes / seconds["prepare, kills and all"]
    print(f"{'rate':<28}{rate:>12,.2f} MB/s, {rate / processes:.2f} per process")
    used = sum(path.stat().st_size for path in (folder / "dataset").rglob("*") if path.is_file())
    print(f"{'dataset':<28}{used / 1e6:>12,.0f} MB")


VERIFY = """
import argparse, sys
from launcher.shards import add_arguments, run
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
"""

if __name__ == "__main__":
    sys.exit(main())
