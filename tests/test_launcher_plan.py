"""What `cloze plan` foretells is what real processes then hold; a run compares the two and says so."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from people_support import command
from support import ROOT, launch, tiny_preset

from bench.plan import compare_memory
from launcher import plan
from launcher.activation_memory import Batch
from launcher.cli import main
from launcher.cost_model import Links, exchange_of, exchange_seconds, step_time
from launcher.jobs import read_jobs
from launcher.memory_plan import Rank, Zero, memory_of, optimizer_numbers, parameters_of, zero_of
from model.config import ModelConfig
from model.weights import parameter_shapes
from trainer.config import load_config
from trainer.ds import read_deepspeed_json
from trainer.optim import state_numel
from trainer.optim_config import OptimConfig

PRESETS = [
    path for path in sorted((ROOT / "configs").glob("*.yaml")) if "\nmodel:" in path.read_text()
]
GPU = ["--device", "NVIDIA H100 80GB HBM3", "--vocab-size", 30_000]


def a_rank(stage: int, world_size: int = 8, **changes: Any) -> Rank:
    rank = Rank(ModelConfig(), 30_000, OptimConfig(), Zero(stage), Batch(8, 128), world_size)
    return replace(rank, **changes)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_parameters_and_state_are_those_of_the_model_that_is_built(preset: Path) -> None:
    config = load_config(preset, [])
    shapes, found = parameter_shapes(config.model, 30_001), parameters_of(config.model, 30_001)
    assert found.total == sum(shape.numel() for shape in shapes.values())
    assert found.layer == sum(s.numel() for n, s in shapes.items() if n.startswith("layers.1."))
    for optim in (OptimConfig(), OptimConfig(name="lamb"), OptimConfig(name="muon", ema_decay=0.9)):
        assert optimizer_numbers(found, optim) == state_numel(shapes, optim)


@pytest.mark.parametrize(
    ("stage", "processes", "model"),
    [
        ("zero0", 2, "bert"),
        ("zero1", 2, "bert"),
        ("zero2", 1, "modernbert"),
        ("zero2_offload", 2, "bert"),
        ("zero3", 2, "modernbert"),
    ],
)
def test_memory_of_a_rank_is_as_foretold(stage: str, processes: int, model: str) -> None:
    settings = [(16, 1, "none"), (16, 2, "full")]
    errors = compare_memory(stage, processes, settings, model=model)
    assert len(errors) == 2
    assert max(map(abs, errors)) < 0.1


def test_state_is_divided_as_zero_says() -> None:
    """Rajbhandari et al. 2020, figure 1: 16 bytes a parameter, and what stays undivided at each stage."""
    numbers = parameters_of(ModelConfig(), 30_000).total
    divided = [memory_of(a_rank(stage, 64)) for stage in (0, 2, 3)]
    assert [round(m.weights / numbers, 2) for m in divided] == [2, 2, 0.03]
    assert [round((m.masters + m.optimizer) / numbers, 2) for m in divided] == [12, 0.19, 0.19]
    assert divided[0].peak > divided[1].peak > divided[2].state


def test_offload_moves_state_to_the_host_and_no_number_is_lost() -> None:
    here, there = memory_of(a_rank(2)), memory_of(a_rank(2, zero=Zero(2, offload_optimizer=True)))
    assert there.masters == there.optimizer == 0
    assert there.host >= here.masters + here.optimizer
    assert there.state < here.state


def test_more_rows_take_more_and_checkpointing_takes_less() -> None:
    rows = [memory_of(a_rank(2, batch=Batch(size, 512))).peak for size in (1, 8, 64)]
    assert rows == sorted(rows)
    modes = ("none", "selective", "full")
    models = [ModelConfig(activation_checkpointing=mode) for mode in modes]
    peaks = [memory_of(a_rank(2, model=model, batch=Batch(64, 512))).peak for model in models]
    assert peaks == sorted(peaks, reverse=True) and peaks[2] < peaks[0] / 2


def test_exchange_is_that_of_the_paper() -> None:
    """Rajbhandari et al. 2020, section 7: 2, 2 and 3 times the parameters, here in bf16, from 7 of 8 ranks."""
    one = parameters_of(ModelConfig(), 30_000).total * 2 * 7 / 8
    assert [round(exchange_of(a_rank(stage)).total / one, 3) for stage in (0, 2, 3)] == [2, 2, 3]
    four = [exchange_of(a_rank(stage, accumulation=4)).total / one for stage in (0, 2, 3)]
    assert [round(times, 3) for times in four] == [2, 5, 12]
    assert exchange_of(a_rank(3, 1)).total == 0


def test_the_slowest_link_counts_and_hiding_is_a_range() -> None:
    links = Links(ranks_per_node=4, link=100e9, node_link=10e9)
    assert exchange_seconds(1e9, 1, links) == 0
    assert exchange_seconds(1e9, 4, links) == pytest.approx(0.01)
    assert exchange_seconds(1e9, 8, links) == pytest.approx(0.1)
    time = step_time(
        a_rank(0), 1e15, flops_per_second=1e14, memory_per_second=1e12, links=links
    )  # fmt: skip
    assert time.compute == pytest.approx(1.25)
    assert time.exposed - time.hidden == pytest.approx(min(time.exchange, time.compute))


def test_every_deepspeed_file_of_the_repository_is_understood() -> None:
    found = {
        path.stem: zero_of(read_deepspeed_json(path)) for path in (ROOT / "ds_configs").glob("*")
    }
    assert {name: (zero.stage, zero.offload_optimizer) for name, zero in found.items()} == {
        "zero0": (0, False), "zero1": (1, False), "zero2": (2, False), "zero3": (3, False),
        "zero2_offload": (2, True), "zero3_offload": (3, True),
    }  # fmt: skip


def test_the_plan_of_a_preset_says_size_memory_advice_time_and_disk(
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ROOT / "configs/base.yaml"
    assert command(plan, base, "--ranks", 8, "--mfu", 0.4, "--no-write", *GPU) == 0
    said = capsys.readouterr().out
    for part in (
        "109,705,010 parameters",
        "from step 900,000",
        "fits",
        "Advice",
        "device hours",
        "Disk",
    ):
        assert part in said
    assert command(plan, base, "--ranks", 8, "--no-write", "--memory-gb", 1, *GPU) == 1
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "Time: not known" in said


def test_advice_fits_and_is_the_quickest_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    preset = ROOT / "configs/modern_10b.yaml"
    arguments = [preset, "--ranks", 64, "--mfu", 0.4, "--no-write", "--json", *GPU]
    command(plan, *arguments)
    found = json.loads(capsys.readouterr().out)

    def seconds(offer: dict[str, Any]) -> float:
        return sum(offer["step_seconds"].values())

    fitting = [offer for offer in found["offers"] if offer["fits"]]
    assert 0 < len(fitting) < len(found["offers"])
    assert found["best"] in fitting
    assert seconds(found["best"]) == min(map(seconds, fitting))


def test_all_that_is_wrong_with_a_command_is_said_at_once() -> None:
    base = ROOT / "configs/base.yaml"
    with pytest.raises(
        ValueError, match=r"--ranks 0 .*; .*one of --mfu, --step-seconds.*--mfu 2\.0"
    ):
        command(plan, base, "--ranks", 0, "--mfu", 2.0, "--step-seconds", 1)
    with pytest.raises(ValueError, match=r"'Abacus' is none of .*--memory-gb and --memory-gb-per"):
        command(plan, base, "--device", "Abacus", "--vocab-size", 30_000)
    with pytest.raises(ValueError, match=r"256 is not a multiple of micro_batch_size 32 x 3 ranks"):
        command(plan, base, "--ranks", 3, *GPU)
    with pytest.raises(ValueError, match=r"give --vocab-size"):
        command(plan, base, "data.path=/nowhere", "--device", "cpu")


@pytest.fixture(scope="module")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that had a plan."""
    folder = tmp_path_factory.mktemp("planned")
    preset = tiny_preset(folder, tiny_dataset)
    assert command(plan, preset, "--device", "cpu", "--step-seconds", 5) == 0
    done = launch(preset)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def events(run: Path) -> list[str]:
    return [e.message for job in read_jobs(run) for e in job.events if e.what == "plan"]


def test_a_run_says_once_how_it_compares_with_its_plan(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (said,) = events(trained)
    assert main(["status", str(trained)]) == 0
    assert said in capsys.readouterr().out
    foretold = json.loads((trained / "plan.json").read_text())["phases"][0]
    assert foretold["step_seconds"] == pytest.approx(5)
    assert f"memory of a rank {foretold['peak_bytes'] / 1e9:.3g} GB foretold" in said
    assert "measured" in said and "step 5 s foretold" in said


def test_a_run_tells_its_speed_to_the_next_plan(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = trained.parent / "preset.yaml"
    more = ["--measured-run", trained, "--json", "--no-write"]
    fast = ["--memory-gb-per-second", 1000]
    assert command(plan, preset, "--device", "cpu", *fast, *more) == 0
    found = json.loads(capsys.readouterr().out)
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    measured = [line["step_seconds"] for line in map(json.loads, lines) if line["kind"] == "train"]
    foretold = sum(found["phases"][0]["step_seconds"].values())
    assert min(measured) <= foretold <= max(measured)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "micro_batch_size: 4 -> 2"),
        ("{", "cannot be read as a plan"),
        ('{"format": 3}', "has format 3"),
    ],
)
def test_a_plan_of_another_setting_or_a_damaged_one_stops_nothing(
    content: str | None, message: str, trained: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, steps=3, micro_batch_size=2)
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(trained / "plan.json", run / "plan.json")
    if content is not None:
        (run / "plan.json").write_text(content)
    done = launch(preset)
    assert done.returncode == 0, done.stderr[-3000:]
    (said,) = events(run)
    assert message in said


def test_what_is_not_counted_is_refused(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tiny_preset(tmp_path, tiny_dataset, data={"objectives": {"rtd": 1, "clm": 1}},
                         model={"generator_divisor": 2})  # fmt: skip
    assert main(["plan", str(preset), "--ranks", "1", "--device", "cpu", "--no-write"]) == 78
    assert "what clm, rtd_generator, rtd cost is not foretold" in capsys.readouterr().err
