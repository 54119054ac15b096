"""FLOP and parameter counts against published shapes, the real module, and torch's own counter."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.flops import Encoded, flops_per_step, num_parameters, peak_flops
from model.weights import build, build_empty

BASE = ModelConfig()
LARGE = ModelConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)


@pytest.mark.parametrize(
    ("config", "length", "masked_fraction", "megaflops_per_token"),
    [
        (LARGE, 128, 0.15, 1878.8),
        (LARGE, 512, 0.20, 2001.7),
        (LARGE, 512, 1.0, 2156.8),
        (BASE, 128, 0.15, 545.4),
        (BASE, 512, 0.15, 587.9),
    ],
)
def test_published_shapes(
    config: ModelConfig, length: int, masked_fraction: float, megaflops_per_token: float
) -> None:
    num_sequences = 100
    flops = flops_per_step(
        config,
        30528,
        num_tokens=num_sequences * length,
        num_attended={None: num_sequences * length**2},
        num_labels={
            "mlm": round(num_sequences * length * masked_fraction),
            "nsp": num_sequences,
        },
    )
    assert flops / (num_sequences * length) / 1e6 == pytest.approx(megaflops_per_token, rel=0.005)


def test_equals_what_torch_counts() -> None:
    """Unpadded full rows, an intermediate size other than four times the hidden size."""
    config = ModelConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        attention="eager",
    )
    rows, length, num_masked = 2, 16, 5
    model = build(config, 100)
    ids = torch.randint(5, 100, (rows, length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        losses = model(
            input_ids=ids,
            token_type_ids=torch.zeros_like(ids),
            position_ids=torch.arange(length).expand(rows, length),
            sequence_ids=torch.zeros_like(ids),
            targets={
                "mlm": (torch.arange(num_masked), torch.arange(num_masked)),
                "nsp": (torch.arange(rows) * length, torch.zeros(rows, dtype=torch.int64)),
            },
        )
        (losses["mlm"].loss_sum + losses["nsp"].loss_sum).backward()
    expected = flops_per_step(
        config,
        100,
        num_tokens=rows * length,
        num_attended={None: rows * length**2},
        num_labels={"mlm": num_masked, "nsp": rows},
    )
    assert counter.get_total_flops() == expected


def test_all_tasks_equal_what_torch_counts() -> None:
    """With the generator's rows and those of second views; the similarities of sequences are left out."""
    from test_model_tasks import BATCH, BERT, VOCAB  # other rows than above: every task has some

    length, given = 24, dict(BATCH)
    for name in ("sequence_ids", "visible"):  # rows that are one sequence without padding
        given[name] = torch.zeros_like(given[name]) + (length - 1) * (name == "visible")
    model = build(replace(BERT, attention="eager"), VOCAB)
    with FlopCounterMode(display=False) as counter:
        losses = model(**given)
        torch.stack([loss.loss_sum for loss in losses.values()]).sum().backward()
    counts = {task: len(labels) for task, (_, labels) in BATCH["targets"].items()}
    rows = {
        task: len((BATCH["targets"][task][0] // length).unique()) for task in ("rtd", "contrastive")
    }
    expected = flops_per_step(
        model.config,
        VOCAB,
        num_tokens=6 * length,
        num_attended={None: 6 * length**2},
        num_labels=counts,
        again={t: Encoded(n * length, {None: n * length**2}) for t, n in rows.items()},
    )
    similarities = (counts["contrastive"] ** 2 + counts["cpc"] ** 2) * BERT.hidden_size
    assert counter.get_total_flops() == expected + 6 * similarities


def test_num_parameters_is_the_modules() -> None:
    odd = ModelConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=50,
        max_position_embeddings=40,
        type_vocab_size=3,
    )
    for config, vocab_size in ((odd, 77), (BASE, 30522)):
        model = build_empty(config, vocab_size)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert num_parameters(config, vocab_size) == count


def test_peak_is_of_the_exact_device_only() -> None:
    assert peak_flops("NVIDIA H200") == 989.4e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    # A slice of a GPU has not the GPU's peak, and V100 has no bf16 units.
    assert peak_flops("NVIDIA H200 MIG 1g.18gb") is None
    assert peak_flops("Tesla V100-SXM2-32GB") is None
