"""Presets, recipes and settings that an attacker has written: safe to read, and wrong ones are named."""

import ast
import re
from pathlib import Path

import pytest
from support import ROOT, tiny_preset

from data.corpus.recipe import load_recipe
from launcher.run_history import RunHistory
from launcher.status import read_status
from trainer.config import load_config
from trainer.run_folder import claim

TAGS = (
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/apply:subprocess.Popen [[touch, {canary}]]",
    "!!python/object/apply:eval [\"open('{canary}', 'w')\"]",
    "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]",
    "!!python/object/new:os.system ['touch {canary}']",
    "!!python/object/new:type {{args: [x, !!python/tuple [], {{}}], listitems: [1]}}",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object:argparse.Namespace {{a: 1}}",
    "!!python/tuple [1]",
    "!!python/bytes 'eA=='",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {canary}']",
    "${{oc.env:HOME}}/$(touch {canary})/`touch {canary}`",
)
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def preset_with(tmp_path: Path, line: str) -> Path:
    path = tiny_preset(tmp_path, tmp_path)
    path.write_text(f"{path.read_text()}\n{line}\n")
    return path


@pytest.mark.parametrize("reader", ["preset", "override", "recipe", "run", "status", "claim"])
@pytest.mark.parametrize("tag", TAGS, ids=range(len(TAGS)))
def test_a_tag_makes_no_object(tag: str, reader: str, tmp_path: Path, canary: Path) -> None:
    value = tag.format(canary=canary)
    path = preset_with(tmp_path, f"init_from: {value}")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"optim: {value}\n")
    try:
        if reader == "preset":
            load_config(path, [])
        elif reader == "override":
            load_config(tiny_preset(tmp_path, tmp_path), [f"init_from={value}"])
        elif reader == "recipe":
            load_recipe(path, [])
        elif reader == "run":
            RunHistory.read(run)
        elif reader == "status":
            read_status(run, now=0.0)
        else:
            claim(run, load_config(tiny_preset(tmp_path, tmp_path), []), {})
    except ValueError as error:
        assert str(tmp_path) in str(error)
    else:
        assert tag == TAGS[-1] and reader in (
            "preset",
            "override",
            "status",
        )  # it is a text, no more
    assert not canary.exists()


WRITTEN = {
    "aliases that unfold to 10^9": (BOMB, "is not valid YAML: .*(expan|limit)"),
    "an alias of itself": ("init_from: &a [*a]", "is not valid YAML: .*recursive"),
    "nested deeply": ("init_from: " + "[" * 20_000, "nested too deeply|not valid YAML"),
    "too large": ("# " + "x" * (1 << 20), "bytes, over 1,048,576: it is no file of settings"),
    "a key twice": ("steps: 9", "is not valid YAML: .*duplicate key"),
    "a key twice inside": ("guard: {window: 10, window: 20}", "duplicate key"),
    "a document after it": ("---\nsteps: 1", "is not valid YAML"),
    "NUL": ("init_from: 'a\0b'", "is not valid YAML"),
    "an escaped NUL": ('init_from: "a\\0b"', "init_from is .*not printable"),
    "a newline": ('init_from: "a\\nb"', "init_from is .*not printable"),
    "escape codes": ('init_from: "\\e]0;owned\\a"', "init_from is .*not printable"),
    "an unknown key": ("callback: os.system", "unknown key callback"),
    "a key that is no text": ("1: 2", "unknown key 1"),
    "a null key": ("null: 2", "unknown key None|cannot be read"),
}


@pytest.mark.parametrize("attack", WRITTEN)
def test_a_preset_is_bounded_and_plain(attack: str, tmp_path: Path) -> None:
    line, expected = WRITTEN[attack]
    path = preset_with(tmp_path, line)
    with pytest.raises(ValueError, match=f"(?s){expected}") as caught:
        load_config(path, [])
    assert str(path) in str(caught.value) and len(str(caught.value)) < 2000


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "preset.yaml"
    path.write_bytes(b"dir: \xff\xfe\x80\n")
    with pytest.raises(ValueError, match=r"preset\.yaml"):
        load_config(path, [])


NUMBERS = {
    "optim.learning_rate=1e-4": None,
    "optim.learning_rate=.nan": "optim.learning_rate must be float, got nan",
    "optim.learning_rate=.inf": "optim.learning_rate must be float, got inf",
    "optim.learning_rate=-1e-4": "optim.learning_rate -0.0001 is negative",
    "optim.weight_decay=-.inf": "optim.weight_decay must be float, got -inf",
    "optim.eps='1e-6'": "optim.eps must be float, got '1e-6'",
    "steps=1e3": "steps must be int, got 1000.0",
    "steps=0x10": None,
    "steps=1e400": "steps must be int, got inf",
    "seed=-1": "seed -1 is negative",
    "time_limit_minutes=.nan": "time_limit_minutes must be",
    "hang_timeout_seconds=.inf": "hang_timeout_seconds must be float, got inf",
    "data.storage.timeout_seconds=.nan": "timeout_seconds must be float, got nan",
    "model.layer_norm_eps=.nan": "layer_norm_eps must be float, got nan",
    "model.hidden_size=1152921504606846976": "hidden_size 1152921504606846976 is above",
    "steps=yes": "steps must be int, got",
}


@pytest.mark.parametrize("override", NUMBERS)
def test_numbers_are_numbers(override: str, tmp_path: Path) -> None:
    path, expected = tiny_preset(tmp_path, tmp_path), NUMBERS[override]
    if expected is None:
        load_config(path, [override])
        return
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_config(path, [override])


SOURCES = [
    path
    for folder in ("data", "model", "trainer", "launcher", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# Slurm's tasks and their results are handed over in a folder of the user's own.
PICKLE_ALLOWED = {"data/executors.py": {"dumps", "loads"}, "bench/data_resume.py": {"dumps", "loads"},
                  "trainer/deepspeed_files.py": {"UnpicklingError"}}  # fmt: skip


def calls(path: Path) -> list[tuple[str, dict[str, ast.expr]]]:
    """(dotted name, keyword arguments) of every call in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        (ast.unparse(node.func), {k.arg or "**": k.value for k in node.keywords})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def is_true(value: ast.expr | None) -> bool:
    return value is not None and not (isinstance(value, ast.Constant) and value.value is False)


def misuse(name: str, keywords: dict[str, ast.expr]) -> str | None:
    """Why a call could run what a file says, or write where it says."""
    last = name.rpartition(".")[2]
    if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "marshal.loads"):
        return "runs text"
    if last in ("extractall", "unpack_archive"):
        return "writes where an archive says"
    if is_true(keywords.get("shell")) or is_true(keywords.get("trust_remote_code")):
        return "runs text, or code that comes with a model"
    if name in ("np.load", "numpy.load") and is_true(keywords.get("allow_pickle")):
        return "unpickles"
    if name == "torch.load":
        safe = keywords.get("weights_only")
        return None if isinstance(safe, ast.Constant) and safe.value is True else "unpickles"
    if (
        name.startswith("Auto")
        and last == "from_pretrained"
        and "trust_remote_code" not in keywords
    ):
        return "asks a person whether code that comes with a model may run"
    if name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
        return "makes objects"
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_code_base_runs_nothing_that_it_reads(path: Path) -> None:
    assert [(name, why) for name, keywords in calls(path) if (why := misuse(name, keywords))] == []
    text = path.read_text(encoding="utf-8")
    used = set(re.findall(r"\b(?:pickle|cPickle|dill|cloudpickle|joblib|shelve)\.(\w+)", text))
    assert used <= PICKLE_ALLOWED.get(path.relative_to(ROOT).as_posix(), set())


def test_the_search_finds_what_it_is_for(tmp_path: Path) -> None:
    wrong = (
        "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "exec(x)",
        "subprocess.run(c, shell=True)", "tar.extractall(p)", "yaml.load(t, Loader=L)", "os.system(c)",
        "A.from_pretrained(p, trust_remote_code=True)", "eval(x)", "shutil.unpack_archive(p)",
        "AutoTokenizer.from_pretrained(p)",
    )  # fmt: skip
    for line in wrong:
        (tmp_path / "x.py").write_text(line)
        assert [misuse(*call) for call in calls(tmp_path / "x.py")] != [None], line
