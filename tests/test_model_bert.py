"""The whole model: packing, checkpointing, precision, empty batches, initialisation, errors."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.checkpointing import ATTENTION, _policy
from model.config import Backend, ModelConfig
from model.heads import TaskLoss
from model.pretraining import ForPreTraining
from model.weights import build, fresh_weights, load_weights, parameter_shapes

VOCAB = 60
CONFIG = ModelConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=24,
)
WITHOUT_DROPOUT = replace(CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
Batch = dict[str, Any]
Losses = dict[str, TaskLoss]


def packed_batch(lengths: list[list[int]], row_length: int) -> Batch:
    """Rows of packed random sequences; every fourth token masked, every sequence labelled."""
    generator = torch.Generator().manual_seed(5)
    shape = (len(lengths), row_length)
    ids, types, positions = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    sequences = torch.full(shape, -1, dtype=torch.int32)
    masked, cls = [], []
    for row, row_lengths in enumerate(lengths):
        start = 0
        for number, length in enumerate(row_lengths):
            slots = slice(start, start + length)
            ids[row, slots] = torch.randint(5, VOCAB, (length,), generator=generator)
            types[row, slots] = (torch.arange(length) > length // 2).long()
            positions[row, slots] = torch.arange(length)
            sequences[row, slots] = number
            masked += [row * row_length + slot for slot in range(start + 1, start + length, 4)]
            cls.append(row * row_length + start)
            start += length
    return {
        "input_ids": ids,
        "token_type_ids": types,
        "position_ids": positions,
        "sequence_ids": sequences,
        "targets": {
            "mlm": (
                torch.tensor(masked),
                torch.randint(5, VOCAB, (len(masked),), generator=generator),
            ),
            "nsp": (torch.tensor(cls), torch.randint(2, (len(cls),), generator=generator)),
        },
    }


def with_targets(batch: Batch, **targets: tuple[torch.Tensor, torch.Tensor]) -> Batch:
    return batch | {"targets": batch["targets"] | targets}


def without_labels(batch: Batch) -> Batch:
    none = {task: (index[:0], labels[:0]) for task, (index, labels) in batch["targets"].items()}
    return with_targets(batch, **none)


def with_labels_of(batch: Batch, other: Batch) -> Batch:
    """The same places, and the labels of another batch."""
    labels = {task: labels for task, (_, labels) in other["targets"].items()}
    given = batch["targets"].items()
    return with_targets(batch, **{task: (index, labels[task]) for task, (index, _) in given})


def total(losses: Losses) -> torch.Tensor:
    return torch.stack([loss.loss_sum for loss in losses.values()]).sum()


def assert_same_losses(first: Losses, second: Losses, rtol: float) -> None:
    assert first.keys() == second.keys()
    for task, loss in first.items():
        for value, expected in zip(loss, second[task], strict=True):
            torch.testing.assert_close(value, expected, rtol=rtol, atol=0, msg=task)


def gradients_of(model: ForPreTraining, losses: Losses) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(total(losses), parameters), strict=True))


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=2e-5, msg=name)


BATCH = packed_batch([[9, 7, 4], [24], [5, 13], [3]], row_length=24)


@pytest.mark.parametrize("attention", ["grouped", "sdpa", "eager"])
def test_packed_rows_equal_one_sequence_per_row(attention: Backend) -> None:
    """The same tokens, packed or each in a row of its own: same losses, hits and gradients."""
    lengths = [[9, 7, 4], [24], [5, 13], [3]]
    alone = packed_batch([[length] for row in lengths for length in row], row_length=24)
    alone = with_labels_of(alone, BATCH)
    model = build(replace(WITHOUT_DROPOUT, attention=attention), VOCAB)
    packed_losses, alone_losses = model(**BATCH), model(**alone)
    assert_same_losses(packed_losses, alone_losses, rtol=1e-6)
    assert_same(gradients_of(model, packed_losses), gradients_of(model, alone_losses))


def test_counts_and_types_of_losses() -> None:
    losses = build(CONFIG, VOCAB)(**BATCH)
    assert list(losses) == ["mlm", "nsp"]
    assert losses["mlm"].count == len(BATCH["targets"]["mlm"][1])
    assert losses["nsp"].count == 7
    for loss in losses.values():
        assert [value.dtype for value in loss] == [torch.float32, torch.int64, torch.int64]
        assert all(value.ndim == 0 for value in loss)
    # Fresh weights know nothing: about ln(vocabulary) nats per token.
    mean = losses["mlm"].loss_sum / losses["mlm"].count
    assert mean.item() == pytest.approx(torch.tensor(VOCAB).log().item(), abs=0.2)


@pytest.mark.parametrize("attention", ["grouped", "sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_nothing_with_dropout_on(
    attention: Backend, dtype: torch.dtype
) -> None:
    outcomes = []
    for mode in ("none", "full", "selective"):
        config = replace(CONFIG, attention=attention, activation_checkpointing=mode)
        model = build(config, VOCAB).to(dtype)
        torch.manual_seed(8)
        losses = model(**BATCH)
        outcomes.append((losses, gradients_of(model, losses)))
    plain, plain_gradients = outcomes[0]
    for recomputed, recomputed_gradients in outcomes[1:]:
        assert plain == recomputed
        for name, gradient in plain_gradients.items():
            assert torch.equal(gradient, recomputed_gradients[name]), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs"
)
def test_compiled_layers_compute_the_same() -> None:
    """Losses and gradients, over batches of other shapes."""
    config = replace(WITHOUT_DROPOUT, num_hidden_layers=1, attention="sdpa")
    plain, compiled = build(config, VOCAB), build(replace(config, compile=True), VOCAB)
    for batch in (BATCH, packed_batch([[9, 7, 4], [24], [20, 2], [6]], row_length=24)):
        losses, expected = compiled(**batch), plain(**batch)
        torch.testing.assert_close(
            losses["mlm"].loss_sum, expected["mlm"].loss_sum, rtol=1e-5, atol=0
        )
        assert_same(gradients_of(compiled, losses), gradients_of(plain, expected))


def test_every_second_layer_can_be_checkpointed() -> None:
    """What is kept for the backward pass falls between keeping all and keeping inputs only."""
    kept = []
    for mode, every in (("none", 1), ("full", 2), ("full", 1)):
        config = replace(CONFIG, activation_checkpointing=mode, checkpoint_every=every)
        model, sizes = build(replace(config, num_hidden_layers=4), VOCAB), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor,
            lambda tensor: tensor,
        ):
            model(**BATCH)
        kept.append(sum(sizes))
    assert kept[0] > kept[1] > kept[2]


def test_dropout_is_on_in_training_only() -> None:
    model = build(CONFIG, VOCAB)
    assert model(**BATCH)["mlm"].loss_sum != model(**BATCH)["mlm"].loss_sum
    model.eval()
    assert model(**BATCH)["mlm"].loss_sum == model(**BATCH)["mlm"].loss_sum


@pytest.mark.parametrize("attention", ["grouped", "sdpa", "eager"])
def test_bf16_is_near_fp32(attention: Backend) -> None:
    """Loss within 0.5 %, the whole gradient within 3 % of its norm."""
    config = replace(WITHOUT_DROPOUT, attention=attention)
    exact_model = build(config, VOCAB)
    exact = exact_model(**BATCH)
    rounded_model = build(config, VOCAB).bfloat16()
    rounded = rounded_model(**BATCH)
    for task, loss in exact.items():
        assert rounded[task].loss_sum.item() == pytest.approx(loss.loss_sum.item(), rel=5e-3)
    want, got = gradients_of(exact_model, exact), gradients_of(rounded_model, rounded)
    flat = torch.cat([want[name].flatten() for name in want])
    error = torch.cat([got[name].float().flatten() for name in want]) - flat
    assert error.norm() < 0.03 * flat.norm()


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_batch_without_labels_gives_zeros(checkpointing: str) -> None:
    config = replace(CONFIG, activation_checkpointing=checkpointing)
    model = build(config, VOCAB)
    losses = model(**without_labels(BATCH))
    assert [value.item() for loss in losses.values() for value in loss] == [0.0, 0, 0, 0.0, 0, 0]
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_rows_of_nothing_but_padding_do_no_harm() -> None:
    model = build(WITHOUT_DROPOUT, VOCAB)
    with_empty_row = packed_batch([[9, 7, 4], [24], [5, 13], [3], []], row_length=24)
    losses, expected = model(**with_empty_row), model(**BATCH)
    torch.testing.assert_close(losses["mlm"].loss_sum, expected["mlm"].loss_sum, rtol=1e-6, atol=0)
    assert_same(gradients_of(model, losses), gradients_of(model, expected))


def test_padding_token_embedding_learns_from_the_output_side_only() -> None:
    model = build(WITHOUT_DROPOUT, VOCAB, pad_token_id=3)
    losses = model(**BATCH)
    losses["mlm"].loss_sum.backward()
    hidden = model.encode(*list(BATCH.values())[:4]).flatten(0, 1)[BATCH["targets"]["mlm"][0]]
    head = model.mlm_head
    transformed = head.layer_norm(torch.nn.functional.gelu(head.transform(hidden)))
    probability = model.mlm_logits(hidden).softmax(-1)[:, 3]
    expected = probability @ transformed  # 3 is no label here
    gradient = model.embeddings.word_embeddings.weight.grad
    assert gradient is not None
    torch.testing.assert_close(gradient[3], expected, rtol=1e-4, atol=1e-6)


def test_initialisation_is_the_published_one_and_has_an_address() -> None:
    config = replace(CONFIG, hidden_size=128, initializer_range=0.03)
    torch.manual_seed(1)
    model = build(config, 1000, seed=4)
    torch.manual_seed(2)
    again, other = build(config, 1000), build(config, 1000, seed=5)
    assert any(
        not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    load_weights(again, dict(fresh_weights(config, 1000, seed=4)))
    for (name, value), same in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(value, same), name
        if value.ndim == 2:
            assert value.abs().max() <= 0.06
            if value.numel() > 5000:
                # A normal distribution cut at two standard deviations has 0.880 of its own.
                assert value.std().item() == pytest.approx(0.880 * 0.03, rel=0.03), name
        else:
            assert torch.equal(value, torch.full_like(value, float("norm.weight" in name))), name


def test_load_weights_is_exact_and_refuses_by_name() -> None:
    source, target = build(CONFIG, VOCAB, seed=1), build(CONFIG, VOCAB)
    weights = {name: value.detach() for name, value in source.named_parameters()}
    assert {name: value.shape for name, value in weights.items()} == parameter_shapes(CONFIG, VOCAB)
    bad = dict(weights)
    del bad["nsp_head.pooler.bias"]
    bad["surplus"] = bad["mlm_head.decoder.bias"]
    bad["mlm_head.decoder.bias"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"nsp_head.pooler.bias is missing; surplus is unknown; "
    ) as e:
        load_weights(target, bad)
    assert "mlm_head.decoder.bias has shape [3] instead of [60]" in str(e.value)
    load_weights(target, weights)
    assert all(torch.equal(p, weights[name]) for name, p in target.named_parameters())
    del weights["nsp_head.pooler.bias"]
    load_weights(target, weights, may_miss=["nsp_head.pooler.bias"])


def test_impossible_shapes_are_refused_all_at_once() -> None:
    with pytest.raises(ValueError) as error:
        ModelConfig(
            hidden_size=100,
            num_attention_heads=12,
            num_hidden_layers=0,
            hidden_dropout_prob=1.0,
            attention="flesh",  # type: ignore[arg-type]
        )
    for part in (
        "hidden_size 100 is not a multiple of num_attention_heads 12",
        "num_hidden_layers 0 is below 1",
        "hidden_dropout_prob 1.0 is not in [0, 1)",
        "attention 'flesh' is not one of auto, grouped, sdpa, eager",
    ):
        assert part in str(error.value)


def test_wrong_inputs_are_refused() -> None:
    model = build(replace(CONFIG, max_position_embeddings=23), VOCAB)
    with pytest.raises(ValueError, match="rows of 24 slots are over max_position_embeddings 23"):
        model(**BATCH)
    model = build(CONFIG, VOCAB)
    with pytest.raises(ValueError, match=r"one shape .*\[4, 24\], \[4, 24\], \[4, 23\], \[4, 24\]"):
        model(**BATCH | {"position_ids": BATCH["position_ids"][:, 1:]})
    index, labels = BATCH["targets"]["nsp"]
    with pytest.raises(ValueError, match=r"nsp index \[7\] and labels \[6\] differ"):
        model(**with_targets(BATCH, nsp=(index, labels[1:])))
    with pytest.raises(ValueError, match="targets of mlm, nsp, sop, the tasks are mlm, nsp"):
        model(**with_targets(BATCH, sop=(index, labels)))
    with pytest.raises(ValueError, match="pad_token_id 60 is not in a vocabulary of 60 tokens"):
        build(CONFIG, VOCAB, pad_token_id=60)


def test_values_out_of_range_are_refused_all_at_once() -> None:
    """On CPUs, before an embedding would fail with an index and no name."""
    model = build(CONFIG, VOCAB)
    wrong = {name: BATCH[name].clone() for name in BATCH if name != "targets"}
    wrong["input_ids"][0, 0] = VOCAB
    wrong["token_type_ids"][1, 1] = 2
    index, labels = (value.clone() for value in BATCH["targets"]["mlm"])
    index[0], labels[0] = 4 * 24, -100
    wrong["targets"] = BATCH["targets"] | {"mlm": (index, labels)}
    with pytest.raises(ValueError) as error:
        model(**wrong)
    for part in (
        "input_ids holds 0 to 60, it must be in 0 to 59",
        "token_type_ids holds 0 to 2, it must be in 0 to 1",
        "mlm_index holds",
        "mlm_labels holds -100 to",
    ):
        assert part in str(error.value)
    for starts in ([0, 9, 16, 20], [1, 96], [0, 30, 20, 96]):
        with pytest.raises(ValueError, match="sequence_starts must ascend from 0 to 96, the slots"):
            model(**BATCH, sequence_starts=torch.tensor(starts, dtype=torch.int32))


@pytest.mark.parametrize("operation", ATTENTION)
def test_attention_that_draws_random_numbers_is_computed_again(operation: Any) -> None:
    """Kept, it would not draw them again, and dropout after it would have other zeros than forward."""
    place = ATTENTION[operation]
    assert operation._schema.arguments[place].name == "dropout_p"
    for dropout, policy in ((0.0, "MUST_SAVE"), (0.1, "PREFER_RECOMPUTE")):
        arguments = [None] * place + [dropout]
        assert _policy(None, operation, *arguments).name == policy
    assert _policy(None, operation, dropout_p=0.1).name == "PREFER_RECOMPUTE"
