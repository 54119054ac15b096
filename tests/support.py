"""What many tests share: a small text with structure, a small preset, real processes."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent

SUBJECTS = "the river|a young teacher|our captain|the old clock|my neighbour|the red fox|her sister"
VERBS = "watched|repaired|remembered|followed|painted|carried|described|forgot"
OBJECTS = "the long road|a wooden bridge|seven small boats|the quiet library|an empty house|the morning market"
PLACES = "near the harbour|in the northern valley|behind the station|before sunrise|without a word"
CHINESE = "今天天气很好。|他走进了图书馆。|我们在河边散步。|城市的夜晚非常安静！|你看见那座桥了吗？"


def pick(choices: str, *address: object) -> str:
    digest = hashlib.sha256(repr(address).encode()).digest()
    options = choices.split("|")
    return options[int.from_bytes(digest[:4], "little") % len(options)]


def document(number: int) -> str:
    """One document of 3 to 30 sentences in paragraphs; every seventh is Chinese."""
    num_sentences = (
        3 + int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:2], "little") % 28
    )
    sentences = []
    for i in range(num_sentences):
        if number % 7 == 0:
            sentences.append(pick(CHINESE, number, i))
            continue
        parts = [
            pick(words, number, i, j) for j, words in enumerate((SUBJECTS, VERBS, OBJECTS, PLACES))
        ]
        sentence = " ".join(parts)
        sentences.append(sentence[0].upper() + sentence[1:] + ". ")
        if i % 5 == 4:
            sentences.append("\n")
    return "".join(sentences).strip()


def write_corpus(path: Path, num_documents: int, start: int = 0) -> Path:
    lines = (
        json.dumps({"id": f"doc{n}", "text": document(n)}, ensure_ascii=False)
        for n in range(start, start + num_documents)
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_preset(folder: Path, dataset: Path, **changes: object) -> Path:
    """A preset that trains in seconds; `changes` are top-level keys, or sections to merge."""
    preset: dict = {
        "dir": str(folder / "run"),
        "steps": 8,
        "global_batch_size": 16,
        "micro_batch_size": 4,
        "precision": "fp32",
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "log_every": 1,
        "eval_every": 0,
        "eval_rows": 24,
        "save_every": 3,
        "verify_hf": "weights",
        "data": {"path": str(dataset), "sequence_length": 64, "num_lanes": 16},
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
            "attention": "eager",
        },
        "optim": {"learning_rate": 1e-3, "warmup_steps": 2},
    }
    for key, value in changes.items():
        preset[key] = {**preset.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "preset.yaml"
    path.write_text(yaml.safe_dump(preset), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    """For child processes: one thread each, the working tree importable, no launcher's variables."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    }
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


TRAIN = ["-m", "launcher.train"]
FAULTY = [str(ROOT / "tests" / "faulty_train.py")]  # the same, with the faults of FAULT_PLAN
FAULTY_CLI = [str(ROOT / "tests" / "faulty_cli.py")]  # `cloze train`, likewise


def train_command(processes: int, script: list[str] = TRAIN) -> list[str]:
    """`processes` real processes of torchrun (one: plain python)."""
    if processes == 1:
        return [sys.executable, *script]
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        *script,
    ]  # fmt: skip


def launch(
    *arguments: object,
    processes: int = 1,
    timeout: int = 240,
    script: list[str] = TRAIN,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run `launcher.train`, or another script, to its end. variables: of the environment."""
    return subprocess.run(
        [*train_command(processes, script), *map(str, arguments)],
        cwd=ROOT,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def read_metrics(run_dir: Path, kind: str = "train") -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [values for values in map(json.loads, lines) if values["kind"] == kind]
