"""Presets, overrides and DeepSpeed JSONs: what is right is read exactly, what is wrong is named."""

import json
from dataclasses import replace
from pathlib import Path

import deepspeed
import pytest
import yaml
from support import ROOT, tiny_preset

from trainer.config import FREE_TO_CHANGE, differences, load_config, to_dict, to_yaml
from trainer.ds import read_deepspeed_json, resolve
from trainer.optim_config import OptimConfig, lr_at
from trainer.phases import learning_rate_at

PRESETS = sorted(set((ROOT / "configs").glob("*.yaml")) - {ROOT / "configs" / "corpus.yaml"})
JSONS = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_every_preset_is_read_and_names_its_command(preset: Path) -> None:
    config = load_config(preset, [])
    assert read_deepspeed_json(ROOT / config.deepspeed)
    header = preset.read_text(encoding="utf-8").partition("\ndir:")[0]
    assert f"configs/{preset.name}" in header


def test_the_resolved_yaml_reproduces_the_run(tmp_path: Path) -> None:
    config = load_config(
        PRESETS[0], ["optim.learning_rate=3e-4", "data.weights={first: 2, second: 1}"]
    )
    written = tmp_path / "config.yaml"
    written.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(written, []) == config
    assert config.optim.learning_rate == 3e-4 and config.data.weights == {"first": 2, "second": 1}


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    preset = tiny_preset(tmp_path, tmp_path, steps="many", precison="bf16", keep_checkpoints=1)
    with pytest.raises(ValueError) as caught:
        load_config(
            preset, ["optim.learning_rat=1e-3", "model.num_attention_heads=5", "data.num_lanes=0"]
        )
    message = str(caught.value)
    for part in (
        "steps must be int, got 'many'",
        "unknown key precison (did you mean 'precision'?)",
        "unknown key optim.learning_rat (did you mean 'learning_rate'?)",
        "hidden_size 32 is not a multiple of num_attention_heads 5",
        "data.num_lanes 0 is below 1",
    ):
        assert part in message, message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim": {"warmup_steps": 8}}, "warmup_steps 8 is not below steps 8"),
        (
            {"data": {"sequence_length": 128}},
            "sequence_length 128 is over model.max_position_embeddings 64",
        ),
        ({"keep_checkpoints": 1}, "keep_checkpoints 1 is below 2"),
        ({"micro_batch_size": 0}, "micro_batch_size 0 is below 1"),
        ({"optim": {"learning_rate": "1e-3x"}}, "optim.learning_rate must be float, got '1e-3x'"),
        ({"optim": {"learning_rate": float("nan")}}, "optim.learning_rate must be float, got nan"),
        ({"precision": "fp16"}, "precision must be one of bf16, fp32, got 'fp16'"),
        ({"data": {"weights": {"a": 0.5}}}, "data.weights must be"),
        ({"data": {"weights": {"a": 0}}}, "data.weights.a is 0"),
        ({"steps": True}, "steps must be int, got True"),
        ({"data": None}, "data must be a mapping, got None"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, changes: dict, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(tiny_preset(tmp_path, tmp_path, **changes), [])
    assert expected in str(caught.value)


def test_unreadable_presets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path / "none.yaml", [])
    broken = tmp_path / "broken.yaml"
    broken.write_text("steps: [1,\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.yaml"):
        load_config(broken, [])
    empty = tmp_path / "empty.yaml"
    empty.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="missing key dir"):
        load_config(empty, [])
    with pytest.raises(ValueError, match="key=value"):
        load_config(PRESETS[0], ["steps"])


def test_what_may_change_between_jobs_of_a_run() -> None:
    config = to_dict(load_config(PRESETS[0], []))
    other = to_dict(
        load_config(PRESETS[0], ["optim.learning_rate=9e-9", "log_every=7", "deepspeed=x.json"])
    )
    assert differences(config, other) == [
        f"optim.learning_rate: {config['optim']['learning_rate']} -> 9e-09"
    ]
    flat = {
        *config,
        *(f"{k}.{inner}" for k, v in config.items() if isinstance(v, dict) for inner in v),
    }
    assert flat >= FREE_TO_CHANGE
    older = {key: value for key, value in config.items() if key != "stuck_after_steps"}
    assert differences(older, config) == []  # a run of an earlier version goes on


@pytest.mark.parametrize("path", JSONS, ids=lambda p: p.stem)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_deepspeed_takes_every_json(path: Path, precision: str) -> None:
    resolved = resolve(
        read_deepspeed_json(path),
        micro_batch_size=2,
        accumulation=3,
        clip_norm=1.0,
        precision=precision,
    )
    parsed = deepspeed.DeepSpeedConfig(resolved)
    assert parsed.train_micro_batch_size_per_gpu == 2
    assert parsed.gradient_accumulation_steps == 3
    assert parsed.gradient_clipping == 1.0
    assert parsed.zero_optimization_stage == resolved["zero_optimization"]["stage"]
    assert parsed.bfloat16_config.enabled == (precision == "bf16")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"zero_optimisation": {"stage": 1}},
            "unknown key 'zero_optimisation' (did you mean 'zero_optimization'?)",
        ),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket": 5}},
            "'zero_optimization.reduce_bucket'",
        ),
        ({"zero_optimization": {"stage": 4}}, "stage must be 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam"}},
            "'optimizer' belongs to the preset",
        ),
        (
            {"zero_optimization": {"stage": 1}, "train_batch_size": 8},
            "its home is global_batch_size",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            'reduce_bucket_size is "auto"',
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "needs stage 1, 2 or 3",
        ),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            "zero_optimization.round_robin_gradients: DeepSpeed then looks for master weights",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "goes to the device cpu, all of it",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu", "ratio": 0.5},
                }
            },
            "goes to the device cpu, all of it",
        ),
        ([], "no JSON object"),
    ],
)
def test_a_json_that_deepspeed_would_misread_is_refused(
    tmp_path: Path, content: object, expected: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_deepspeed_json(path)
    assert expected in str(caught.value)


def test_missing_and_broken_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_deepspeed_json(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_deepspeed_json(tmp_path / "broken.json")


def test_learning_rate_by_hand() -> None:
    linear = OptimConfig(learning_rate=1.0, warmup_steps=4, schedule="linear")
    assert [lr_at(step, linear, 8) for step in range(8)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        0.75,
        0.5,
        0.25,
    ]
    cosine = OptimConfig(learning_rate=2.0, warmup_steps=0, schedule="cosine", final_fraction=0.1)
    assert lr_at(0, cosine, 10) == 2.0
    assert lr_at(5, cosine, 10) == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert lr_at(10, cosine, 10) == pytest.approx(0.2)


def test_constant_and_stable_rates() -> None:
    constant = OptimConfig(learning_rate=2.0, warmup_steps=2, schedule="constant")
    assert [lr_at(step, constant, 5) for step in range(6)] == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    wsd = OptimConfig(
        learning_rate=1.0, warmup_steps=2, schedule="wsd", decay_steps=4, final_fraction=0.2
    )
    expected = [
        0.5,
        1.0,
        1.0,
        1.0,
        1.0,
        0.6,
        0.2 + 0.8 * (1 - 0.5**0.5),
        0.2 + 0.8 * (1 - 0.75**0.5),
    ]
    assert [lr_at(step, wsd, 8) for step in range(8)] == pytest.approx(expected)
    assert lr_at(8, wsd, 8) == pytest.approx(0.2)


def test_phases_have_schedules_of_their_own(tmp_path: Path) -> None:
    optim = {"learning_rate": 1.0, "warmup_steps": 2}
    phases = [
        {"first_step": 2},  # changes no rate
        {"first_step": 6, "learning_rate": 0.5, "warmup_steps": 1},
    ]
    run = load_config(tiny_preset(tmp_path, tmp_path, steps=10, optim=optim, phases=phases), [])
    rates = [learning_rate_at(run, step) for step in range(10)]
    expected = [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.5, 0.5, 0.5 * 2 / 3, 0.5 / 3]
    assert rates == pytest.approx(expected)
    other = to_dict(
        replace(run, phases=(*run.phases[:1], replace(run.phases[1], learning_rate=0.4)))
    )
    assert differences(to_dict(run), other) == [
        "learning rates of phases: [[6, 0.5, 1]] -> [[6, 0.4, 1]]"
    ]
    older = to_dict(run)
    older["optim"] = {
        name: older["optim"][name]
        for name in ("learning_rate", "warmup_steps")  # all that it knew
    }
    assert differences(older, to_dict(run)) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"phases": [{"first_step": 4, "warmup_steps": 1}]}, "warmup_steps needs a learning_rate"),
        ({"phases": [{"first_step": 4, "learning_rate": 0.0}]}, "learning_rate 0.0 is not above 0"),
        (
            {"phases": [{"first_step": 6, "learning_rate": 1.0, "warmup_steps": 2}]},
            "optim.warmup_steps 2 of the phase at step 6 is not below steps 2",
        ),
        (
            {"optim": {"schedule": "wsd", "decay_steps": 7, "warmup_steps": 2}},
            "optim.warmup_steps 2 and decay_steps 7 are more than its 8 steps",
        ),
        ({"optim": {"name": "sgd"}}, "optim.name must be one of"),
    ],
)
def test_schedules_that_cannot_be_are_refused(tmp_path: Path, changes: dict, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(tiny_preset(tmp_path, tmp_path, **changes), [])
    assert expected in str(caught.value)


def test_yaml_is_yaml_1_2_where_it_matters() -> None:
    """1e-4 is a number, not the string that YAML 1.1 makes of it."""
    assert yaml.safe_load("1e-4") == "1e-4"
    config = load_config(PRESETS[0], ["optim.eps=1e-6"])
    assert config.optim.eps == 1e-6
