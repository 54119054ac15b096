"""Every objective, trained on a text in which it can be learnt, gets clearly better than guessing."""

import json
import random
from pathlib import Path

import pytest
from support import ROOT, launch, read_metrics, tiny_preset

from data.objectives import TASKS, read_mixture
from data.prepare import PrepareConfig, prepare
from trainer.thermometer import readings_of

NUMBERS = "One Two Three Four Five Six Seven Eight Nine Ten Eleven Twelve Thirteen Fourteen Fifteen Sixteen"
SUBJECTS = "river harbour library bridge clock teacher captain fox garden market winter letter engine castle"
VERBS = (
    "painted counted measured remembered followed described repaired walked slept sang fell rose"
)
OF_SENTENCES = {"mlm+sop": 1, "mlm+order": 1, "mlm+distance": 1, "mlm+reorder+relative": 1}
OF_TOKENS = {
    "wwm": 1, "ngram": 1, "static_mlm": 1, "rtd": 3, "clm": 1, "prefix_lm": 1, "denoise": 1,
    "mlm+word_order": 1, "mlm+contrastive": 1, "mlm+cpc": 2,
}  # fmt: skip
# Later than here: two layers compare what two texts are about, fill whole spans, and outdo the frequencies of
# words where the loss of finding the replaced ones weighs 50 times as much (docs/which-objectives.md).
LATER = {"nsp", "span", "rtd_generator"}


def numbered(number: int) -> str:
    """A document about one thing, whose sentences are counted: what follows what can be told."""
    draw = random.Random(number)
    subject, length = draw.choice(SUBJECTS.split()), draw.randint(8, 16)
    return " ".join(
        f"{number} {subject} {draw.choice(VERBS.split())}." for number in NUMBERS.split()[:length]
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numbered")
    lines = [json.dumps({"id": f"{n}", "text": numbered(n)}) for n in range(6000)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return prepare(
        PrepareConfig(
            output=str(folder / "dataset"), sources={"text": (str(folder / "text.jsonl"),)}, vocab_size=320,
            heldout_fraction=0.1, num_processes=1,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("objectives", "steps", "dropout"), [(OF_SENTENCES, 400, 0.0), (OF_TOKENS, 300, 0.05)]
)
def test_every_objective_learns(
    objectives: dict[str, int], steps: int, dropout: float, dataset: Path, tmp_path: Path
) -> None:
    preset = tiny_preset(
        tmp_path, dataset, steps=steps, global_batch_size=32, micro_batch_size=32, eval_rows=500,
        log_every=100, save_every=0, precision="bf16",
        deepspeed=str(ROOT / "ds_configs" / "zero0.json"),
        data={"objectives": objectives, "num_lanes": 32},
        model={
            "architecture": "modernbert", "hidden_size": 64, "intermediate_size": 128, "attention": "auto",
            "layer_norm_eps": 1e-5, "global_attention_every": 1, "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": 0.0, "generator_divisor": 2,
        },
        optim={"name": "muon", "learning_rate": 1e-2, "warmup_steps": 20},
    )  # fmt: skip
    result = launch(preset)
    assert result.returncode == 0, result.stderr
    (line,) = read_metrics(tmp_path / "run", "heldout")
    readings = readings_of(line)
    assert [reading.task for reading in readings] == list(read_mixture(objectives).tasks)
    early = [reading for reading in readings if reading.task not in LATER]
    assert {reading.task: reading.level for reading in early} == {
        reading.task: "better" for reading in early
    }, readings


def test_no_other_task_is_left_out() -> None:
    assert set(read_mixture(OF_SENTENCES | OF_TOKENS).tasks) | LATER == set(TASKS)
