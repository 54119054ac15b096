"""Every task beside its plain formula; causal rows; the generator; nothing to learn gives zeros everywhere."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from task_reference import VOCABULARY, Reference
from test_model_bert import packed_batch, total

from model.config import Backend, ModelConfig
from model.pretraining import ForPreTraining
from model.tasks import REORDER_PARTS, TASKS
from model.weights import build

VOCAB, LENGTH = 60, 24
LENGTHS = [[9, 7, 4], [24], [5, 13], [3], [11, 11], [12, 12]]
ALL_TASKS = tuple(TASKS)
BERT = ModelConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    initializer_range=0.2, tasks=ALL_TASKS, generator_divisor=2,
)  # fmt: skip
MODERN = replace(
    BERT,
    architecture="modernbert",
    layer_norm_eps=1e-5,
    global_attention_every=2,
    local_attention=4,
)
CONFIGS = {"bert": BERT, "modernbert": MODERN}
BACKENDS: tuple[Backend, ...] = ("grouped", "sdpa", "eager")
CAUSAL = ("clm", "prefix_lm", "denoise")
PREFIX = 3  # slots that see each other
Batch = dict[str, Any]


def batch_of_all() -> Batch:
    """Six rows: 4 is causal, 5 has prefixes, 2 and 3 have replaced tokens."""
    batch = packed_batch(LENGTHS, row_length=LENGTH)
    draw = torch.Generator().manual_seed(11)
    ids, positions = batch["sequence_ids"], batch["position_ids"]
    own = torch.arange(LENGTH).expand(ids.shape)
    starts = own - positions
    lengths = torch.stack([(row[:, None] == row).sum(1) for row in ids])
    visible = torch.where(ids >= 0, starts + lengths - 1, 0)
    visible[4] = own[4]
    visible[5] = torch.maximum(own[5], starts[5] + PREFIX - 1)
    slots = torch.arange(ids.numel()).view(ids.shape)
    filled = ids >= 0

    def labels(number: int, limit: int) -> torch.Tensor:
        return torch.randint(limit, (number,), generator=draw)

    def some(row: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = slots[row][filled[row]][1::step]
        return index, labels(len(index), VOCAB)

    text = slots[2:4][filled[2:4] & (positions[2:4] > 0)]
    masked = text[::3]
    real = batch["input_ids"].flatten()[text].clone()
    real[::3] = labels(len(masked), VOCAB)
    cls = slots[filled & (positions == 0)]
    targets = {task: some(row % 2, 2 + row) for row, task in enumerate(VOCABULARY)}
    targets |= {"clm": some(4, 1), "prefix_lm": some(5, 2), "denoise": some(5, 3)}
    targets |= {"rtd_generator": (masked, real[::3]), "rtd": (text, real)}
    for task in ("nsp", "sop", "order", "distance"):
        chosen = cls[torch.randperm(len(cls), generator=draw)[:5]]
        targets[task] = (chosen, labels(5, TASKS[task].num_classes))
    parts = slots[1, [0, 6, 11, 17]]
    targets["reorder"] = (parts, torch.randperm(REORDER_PARTS, generator=draw))
    targets["relative"] = (parts[torch.tensor([[0, 1], [2, 1], [3, 0]])], labels(3, 6))
    targets["contrastive"] = (cls[:4], torch.zeros(4, dtype=torch.int64))
    targets["cpc"] = (cls[:6].view(3, 2), torch.zeros(3, dtype=torch.int64))
    return batch | {"visible": visible.int(), "targets": {task: targets[task] for task in TASKS}}


def only(batch: Batch, *tasks: str) -> Batch:
    return batch | {"targets": {task: batch["targets"][task] for task in tasks}}


def emptied(batch: Batch, *tasks: str) -> Batch:
    none = {task: tuple(each[:0] for each in batch["targets"][task]) for task in tasks}
    return batch | {"targets": batch["targets"] | none}


def with_tasks(model: ForPreTraining, *tasks: str, vocab_size: int = VOCAB) -> ForPreTraining:
    """A model of fewer tasks with the same weights."""
    fewer = build(replace(model.config, tasks=tasks), vocab_size)
    with torch.no_grad():
        for name, parameter in fewer.named_parameters():
            parameter.copy_(model.get_parameter(name))
    return fewer


def gradients(loss: torch.Tensor, model: ForPreTraining) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for name, parameter, gradient in zip(names, parameters, found, strict=True)
    }


BATCH = batch_of_all()
SINGLE = [(task,) for task in TASKS if task not in ("rtd", "rtd_generator")]


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_task_equals_its_formula(kind: str, attention: Backend) -> None:
    """Loss and every gradient, fp32, all tasks packed in one batch, and the formula for each sequence alone."""
    model = build(replace(CONFIGS[kind], attention=attention), VOCAB, seed=2)
    torch.manual_seed(4)
    losses = model(**BATCH)
    torch.manual_seed(4)
    expected = Reference(model).losses(BATCH, ALL_TASKS)
    assert list(losses) == list(ALL_TASKS)
    for task, loss in losses.items():
        assert loss.count == len(BATCH["targets"][task][1]) > 0
        torch.testing.assert_close(loss.loss_sum, expected[task], rtol=2e-5, atol=1e-5, msg=task)
        found, want = gradients(loss.loss_sum, model), gradients(expected[task], model)
        assert any(gradient.any() for gradient in want.values())
        for name, gradient in want.items():
            scale = max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(
                found[name] / scale, gradient / scale, rtol=0, atol=2e-5, msg=f"{task}: {name}"
            )


@pytest.mark.parametrize("tasks", [*SINGLE, ("rtd_generator", "rtd")], ids="-".join)
def test_a_task_among_others_has_the_loss_that_it_has_alone(tasks: tuple[str, ...]) -> None:
    model = build(BERT, VOCAB, seed=2)
    alone, given = with_tasks(model, *tasks), BATCH
    if "rtd" not in tasks:  # else the others read what the generator replaced
        given = emptied(BATCH, "rtd", "rtd_generator")
    torch.manual_seed(4)
    together = model(**given)
    torch.manual_seed(4)
    losses = alone(**only(given, *tasks))
    assert list(losses) == list(tasks)
    for task, loss in losses.items():
        for value, expected in zip(loss, together[task], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_no_labels_give_zeros_for_every_weight(kind: str, attention: Backend) -> None:
    model = build(replace(CONFIGS[kind], attention=attention), VOCAB)
    losses = model(**emptied(BATCH, *ALL_TASKS))
    assert {value.item() for loss in losses.values() for value in loss} == {0.0}
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


@pytest.mark.parametrize("task", ALL_TASKS)
def test_one_task_without_labels_leaves_the_others(task: str) -> None:
    model = build(BERT, VOCAB)
    losses = model(**emptied(BATCH, task))
    assert [value.item() for value in losses[task]] == [0.0, 0, 0]
    assert all(loss.count > 0 for name, loss in losses.items() if name != task)
    total(losses).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_later_tokens_do_not_leak(kind: str, attention: Backend) -> None:
    """Causal rows: nothing before a changed token changes. After a prefix the same; within it all do."""
    model = build(replace(CONFIGS[kind], attention=attention), VOCAB).eval()
    names = ("input_ids", "token_type_ids", "position_ids", "sequence_ids", "visible")
    given = [BATCH[name] for name in names]
    changed = [given[0].clone(), *given[1:]]
    changed[0][4:, [6, 18]] = (changed[0][4:, [6, 18]] + 1) % VOCAB
    with torch.no_grad():
        moved = (model.encode(*given) - model.encode(*changed)).abs().amax(-1) > 1e-6
    assert not moved[:4].any()
    for row, lengths in ((4, (11, 11)), (5, (12, 12))):
        for start, slot, length in zip((0, lengths[0]), (6, 18), lengths, strict=True):
            assert not moved[row, start:slot].any()
            assert moved[row, slot : start + length].all()
    changed = [given[0].clone(), *given[1:]]
    changed[0][5, 1] = (changed[0][5, 1] + 1) % VOCAB  # in the prefix of the first sequence
    with torch.no_grad():
        moved = (model.encode(*given) - model.encode(*changed)).abs().amax(-1) > 1e-6
    assert moved[5, :PREFIX].all() and not moved[5, 12:].any()


def test_samples_follow_the_softmax_and_are_seeded() -> None:
    """Of 20,000 draws each token's share is its probability, within 5 deviations."""
    from model.heads import draw

    scores = torch.tensor([2.0, 0.0, -1.0, 1.0])
    torch.manual_seed(1)
    samples = draw(scores.expand(20_000, 4))
    shares, wanted = torch.bincount(samples, minlength=4) / 20_000, scores.softmax(0)
    assert ((shares - wanted).abs() < 5 * (wanted * (1 - wanted) / 20_000).sqrt()).all()
    torch.manual_seed(1)
    assert torch.equal(draw(scores.expand(20_000, 4)), samples)


@pytest.mark.parametrize("training", [True, False])
def test_the_discriminator_reads_samples_and_teaches_no_generator(training: bool) -> None:
    model = build(replace(BERT, tasks=("rtd_generator", "rtd")), VOCAB).train(training)
    batch = only(BATCH, "rtd_generator", "rtd")
    first, second = (model(**batch)["rtd"].loss_sum for _ in range(2))
    assert first != second  # other samples: there is no dropout here
    gradient = gradients(first, model)
    assert not any(g.any() for name, g in gradient.items() if name.startswith("generator."))
    losses = model(**batch)
    found = gradients(losses["rtd_generator"].loss_sum, model)
    assert not any(
        g.any() for name, g in found.items() if name.startswith(("layers.", "rtd_head."))
    )
    rows = [0, 1, 4, 5]  # whose tokens neither of them is asked about
    other = batch | {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][rows] = 7
    torch.manual_seed(3)
    expected = model(**batch)
    torch.manual_seed(3)
    for task, loss in model(**other).items():
        torch.testing.assert_close(loss.loss_sum, expected[task].loss_sum, rtol=1e-6, atol=0)


def test_a_second_view_has_other_dropout_and_only_its_rows_are_encoded() -> None:
    config = replace(BERT, tasks=("contrastive",), hidden_dropout_prob=0.3)
    model, batch = build(config, VOCAB), only(BATCH, "contrastive")
    seen = []
    model.embeddings.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    with_dropout = model(**batch)["contrastive"]
    plain = build(replace(config, hidden_dropout_prob=0.0), VOCAB)(**batch)["contrastive"]
    assert with_dropout.loss_sum > plain.loss_sum and plain.num_correct == 4
    assert seen[1] < seen[0]  # rows 0 and 1 of six


def test_impossible_tasks_are_refused_all_at_once() -> None:
    with pytest.raises(ValueError) as error:
        ModelConfig(tasks=("mlm", "mlm", "nso", "rtd"))
    for part in ("task 'nso' is not one of mlm, wwm", "'mlm' is there twice", "'rtd' is alone"):
        assert part in str(error.value)
    with pytest.raises(
        ValueError, match="num_attention_heads 12 is not a multiple of generator_divisor 5"
    ):
        ModelConfig(tasks=("rtd_generator", "rtd"), generator_divisor=5)
    with pytest.raises(ValueError, match="tasks is empty"):
        ModelConfig(tasks=())


def test_wrong_targets_are_refused() -> None:
    model = build(BERT, VOCAB)
    index, labels = BATCH["targets"]["relative"]
    for wrong, message in (
        (
            {"relative": (index[:, 0], labels)},
            r"relative index \[3\] and labels \[3\] differ: .* 2 slots",
        ),
        ({"relative": (index, labels + 6)}, "relative_labels holds .* it must be in 0 to 5"),
        ({"cpc": (BATCH["targets"]["cpc"][0] + 150, labels * 0)}, "cpc_index holds"),
        ({"rtd": (BATCH["targets"]["rtd"][0], BATCH["targets"]["rtd"][1] + VOCAB)}, "rtd_labels"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**BATCH | {"targets": BATCH["targets"] | wrong})
    visible = BATCH["visible"].clone()
    visible[4, 9] = 8
    with pytest.raises(ValueError, match="visible of row 4, slot 9 is 8: it must be in 9"):
        model(**BATCH | {"visible": visible})
