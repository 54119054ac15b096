"""Attention of packed rows: each sequence as if alone, all backends alike, padding harmless."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model.attention import attend, attend_blocks, attend_eager
from model.config import Backend, ModelConfig
from model.dropout import drop_out
from model.layout import Window, choose_backend, find_starts, lay_out, sequence_mask

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
Tensors = tuple[torch.Tensor, ...]
BACKENDS: tuple[Backend, ...] = ("grouped", "sdpa", "eager", "flex")
SEQUENCE_IDS = torch.tensor(
    [[0] * 5 + [1] * 9 + [2] * 3 + [-1] * 3, [0] * 20, [0] * 1 + [-1] * 19, [-1] * 20],
    dtype=torch.int32,
)


def random_qkv(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensors:
    """Queries, keys and values for all slots of the rows, [B * L, H, K]."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in "qkv")


def run(
    backend: Backend,
    qkv: Tensors,
    sequence_ids: torch.Tensor,
    window: Window = None,
    visible: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output at every filled slot of the rows (0 elsewhere), and gradients of a weighted sum of it."""
    if backend == "flex":
        qkv = tuple(tensor.detach() for tensor in qkv)
    layout = lay_out(
        sequence_ids, None, visible, backend=backend, windows=[window], dtype=qkv[0].dtype
    )
    flat = qkv if layout.slot_T is None else tuple(tensor[layout.slot_T] for tensor in qkv)
    output = attend(flat[0], flat[1], flat[2], layout.segments, window=window, dropout=0.0)
    output = output if layout.place is None else output[layout.place]
    output = output * (sequence_ids.flatten() >= 0)[:, None]
    if backend == "flex":  # on CPUs it has no backward pass
        return output, []
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((output * weights).sum(), qkv)
    return output.detach(), list(gradients)


def alone(
    qkv: Tensors, slots: torch.Tensor, window: Window, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """The equation for one sequence, [n, H * K]. visible: of its slots, counted within the sequence."""
    query, key, value = (tensor[slots].transpose(0, 1) for tensor in qkv)
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    if window is not None:
        index = torch.arange(len(slots))
        scores = scores.masked_fill((index[:, None] - index).abs() > window, float("-inf"))
    if visible is not None:
        scores = scores.masked_fill(torch.arange(len(slots)) > visible[:, None], float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_each_sequence_alone(backend: Backend, window: Window) -> None:
    qkv = random_qkv((80, 2, 8))
    output, gradients = run(backend, qkv, SEQUENCE_IDS, window)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros(())
    for row in range(4):
        for sequence in SEQUENCE_IDS[row].unique().tolist():
            slots = (SEQUENCE_IDS[row] == sequence).nonzero().flatten() + 20 * row
            if sequence >= 0:
                value = alone(qkv, slots, window)
                torch.testing.assert_close(output[slots], value, rtol=0, atol=2e-6)
                expected = expected + (value * weights[slots]).sum()
    # No gradient crosses from one sequence to another.
    separate_gradients = torch.autograd.grad(expected, qkv) if gradients else ()
    for packed, separate in zip(gradients, separate_gradients, strict=True):
        torch.testing.assert_close(packed, separate, rtol=0, atol=2e-6)


VISIBLE = {  # of SEQUENCE_IDS: all see all before them; those of row 1 a prefix of 4, too
    "causal": torch.arange(20).expand(4, 20).int(),
    "prefix": torch.arange(20).expand(4, 20).clamp(min=4).int(),
    "mixed": torch.cat([torch.arange(20)[None], torch.full((3, 20), 19)]).int(),
    "unset padding": torch.arange(20).expand(4, 20).int() * (SEQUENCE_IDS >= 0),
}


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("kind", VISIBLE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_visible_says_what_a_slot_attends_to(backend: Backend, kind: str, window: Window) -> None:
    """Output, and gradients where there are, of each sequence alone; padding has any values."""
    qkv, visible = random_qkv((80, 2, 8)), VISIBLE[kind]
    output, gradients = run(backend, qkv, SEQUENCE_IDS, window, visible)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros(())
    for row, number in ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0)):
        slots = (SEQUENCE_IDS[row] == number).nonzero().flatten()
        within = torch.maximum(visible[row, slots], slots) - slots[0]
        value = alone(qkv, slots + 20 * row, window, within)
        torch.testing.assert_close(output[slots + 20 * row], value, rtol=0, atol=2e-6)
        expected = expected + (value * weights[slots + 20 * row]).sum()
    separate_gradients = torch.autograd.grad(expected, qkv) if gradients else ()
    for packed, separate in zip(gradients, separate_gradients, strict=True):
        torch.testing.assert_close(packed, separate, rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("backend", ["grouped", "sdpa", "flex"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_backends_agree_with_eager(
    backend: Backend, dtype: torch.dtype, tolerance: float, window: Window
) -> None:
    qkv = random_qkv((80, 2, 8), dtype)
    output, gradients = run(backend, qkv, SEQUENCE_IDS, window)
    expected_output, expected_gradients = run("eager", qkv, SEQUENCE_IDS, window)
    for value, expected in zip(
        [output, *gradients],
        [expected_output, *expected_gradients[: len(gradients)]],
        strict=True,
    ):
        assert torch.isfinite(value).all()
        scale = expected.abs().max()
        torch.testing.assert_close(value / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_rows_whose_first_blocks_are_all_masked(backend: Backend) -> None:
    """Fused kernels go through the keys in blocks of hundreds; a whole block may be forbidden."""
    sequence_ids = torch.tensor([[0] * 1030 + [1] * 6 + [-1] * 4], dtype=torch.int32)
    qkv = random_qkv((1040, 2, 8))
    output, gradients = run(backend, qkv, sequence_ids)
    slots = torch.arange(1030, 1036)
    torch.testing.assert_close(output[slots], alone(qkv, slots, None), rtol=0, atol=2e-6)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("lengths", [[16], [17, 17], [40, 33, 38], [16, 1]])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_blocks_equal_the_band(lengths: list[int], window: int) -> None:
    """Local attention block by block, and with a mask of all slots; keys that are none included."""
    longest = max(lengths)
    is_key = torch.arange(longest) < torch.tensor(lengths)[:, None]
    padding = torch.zeros(is_key.shape).masked_fill_(~is_key, float("-inf"))[:, None, None, :]
    qkv = random_qkv((len(lengths), 2, longest, 8))
    given = padding if not is_key.all() else None
    output = attend_blocks(qkv[0], qkv[1], qkv[2], given, window=window, dropout=0.0)
    band = sequence_mask(torch.zeros(1, longest), torch.float32, window)
    expected = attend_eager(
        qkv[0], qkv[1], qkv[2], torch.maximum(band + padding, -1e30 * torch.ones(1)), 0.0
    )
    filled = is_key[:, None, :, None]
    assert torch.isfinite(output).all()
    torch.testing.assert_close(output * filled, expected * filled, rtol=0, atol=2e-6)
    gradients = torch.autograd.grad((output * filled).square().sum(), qkv)
    wanted = torch.autograd.grad((expected * filled).square().sum(), qkv)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=0, atol=5e-6)


def test_starts_are_found_and_may_be_given_with_the_end_repeated() -> None:
    starts = find_starts(SEQUENCE_IDS)
    assert starts.tolist() == [0, 5, 14, 17, 20, 40, 41, 60, 80]
    given = torch.cat([starts, starts[-1:].expand(7)])
    layouts = [
        lay_out(SEQUENCE_IDS, each, backend="grouped", windows=[None], dtype=torch.float32)
        for each in (None, given)
    ]
    assert layouts[0].slot_T is not None and layouts[1].slot_T is not None
    assert torch.equal(layouts[0].slot_T, layouts[1].slot_T)


def test_grouped_slots_show_every_token_once_with_little_padding() -> None:
    lengths = torch.randint(3, 128, (200,), generator=torch.Generator().manual_seed(3))
    sequence_ids = torch.full((200, 128), -1)
    sequence_ids[torch.arange(128) < lengths[:, None]] = 0
    layout = lay_out(sequence_ids, None, backend="grouped", windows=[None], dtype=torch.float32)
    assert layout.slot_T is not None and layout.place is not None
    filled = (sequence_ids.flatten() >= 0).nonzero().flatten()
    assert torch.equal(layout.slot_T[layout.place[filled]], filled)
    assert len(layout.slot_T) < 1.08 * len(filled)


@pytest.mark.parametrize("backend", ["grouped", "sdpa", "eager"])
def test_dropout_keeps_the_expectation(backend: Backend) -> None:
    """The values are all one: every output is the sum of the probabilities that were kept."""
    query, key, _ = random_qkv((1024, 4, 8))
    sequence_ids = torch.zeros(64, 16, dtype=torch.int32)
    layout = lay_out(sequence_ids, None, backend=backend, windows=[None], dtype=torch.float32)
    torch.manual_seed(3)
    output = attend(query, key, torch.ones_like(key), layout.segments, window=None, dropout=0.25)
    assert output.mean().item() == pytest.approx(1.0, abs=0.02)
    assert output.std().item() > 0.05


def test_backend_is_chosen_by_device_and_rows_and_never_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, gpu, bf16 = torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16
    installed = {"triton": True, "flash_attn": False}
    monkeypatch.setattr("model.layout._is_installed", installed.__getitem__)
    shared = {"bytes": 227 << 10}
    monkeypatch.setattr("model.layout._shared_bytes", lambda device: shared["bytes"])
    plain = ModelConfig()
    causal = replace(plain, tasks=("mlm", "clm"))

    def chosen(
        backend: Backend, device: torch.device, dtype: torch.dtype = bf16,
        row_length: int = 512, config: ModelConfig = plain,
    ) -> Backend:  # fmt: skip
        return choose_backend(replace(config, attention=backend), device, dtype, row_length)

    assert chosen("auto", cpu) == chosen("auto", cpu, config=causal) == "grouped"
    assert chosen("auto", gpu) == "varlen"
    assert chosen("auto", gpu, row_length=128) == "short_rows"
    assert chosen("auto", gpu, row_length=128, config=causal) == "short_rows"
    assert (
        chosen("auto", gpu, row_length=128, config=replace(plain, num_attention_heads=3))
        == "varlen"
    )
    assert chosen("auto", gpu, config=causal) == chosen("auto", gpu, torch.float32) == "sdpa"
    assert chosen("auto", gpu, config=replace(plain, hidden_size=720)) == "sdpa"  # heads of 60
    odd = replace(plain, hidden_size=66, num_attention_heads=2)
    assert chosen("auto", gpu, row_length=128, config=odd) == "sdpa"
    shared["bytes"] = 99 << 10
    assert chosen("auto", gpu, row_length=128) == "varlen"
    shared["bytes"] = 227 << 10
    assert chosen("eager", gpu) == "eager"
    no_dropout = replace(causal, attention_probs_dropout_prob=0.0)
    assert chosen("flex", gpu, config=no_dropout) == "flex"
    installed["triton"] = False
    assert chosen("auto", gpu, row_length=128) == "varlen"
    for asked, words in (
        (lambda: chosen("varlen", gpu, config=causal), "'varlen' shows every slot its whole sequence"),
        (lambda: chosen("varlen", gpu, config=replace(plain, hidden_size=720)), "multiple of 8 features"),
        (lambda: chosen("varlen", cpu), "'varlen' needs a GPU, this is cpu: use 'grouped'"),
        (lambda: chosen("varlen", gpu, torch.float32), r"needs precision bf16, not torch\.float32"),
        (lambda: chosen("short_rows", cpu, row_length=8), "'short_rows' needs a GPU"),
        (lambda: chosen("short_rows", gpu, row_length=8), "needs the package triton"),
        (lambda: chosen("flash", gpu), "pip install flash-attn"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            asked()
    installed["triton"] = True
    with pytest.raises(ValueError, match=r"rows of up to 128 slots .* not 129 and 64;"):
        chosen("short_rows", gpu, row_length=129)
    with pytest.raises(ValueError, match="'varlen' cannot compute rows with `visible`"):
        ids, visible = SEQUENCE_IDS, torch.zeros_like(SEQUENCE_IDS)
        lay_out(ids, None, visible, backend="varlen", windows=[None], dtype=bf16)
    with pytest.raises(ValueError, match=r"'flex' cannot drop out"):
        ModelConfig(attention="flex")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_own_dropout_is_that_of_torch(dtype: torch.dtype, probability: float) -> None:
    """Other zeros at the same rate (within 5 deviations), independent; the same other value."""
    values = torch.ones(999, 1001, dtype=dtype, requires_grad=True)
    torch.manual_seed(4)
    mine, twin = drop_out(values, probability), F.dropout(values, probability)
    torch.testing.assert_close(mine.unique(), twin.unique(), rtol=1e-4, atol=0)
    zeros = mine.detach() == 0
    tolerance = 5 * (probability * (1 - probability) / values.numel()) ** 0.5
    assert zeros.float().mean().item() == pytest.approx(probability, abs=tolerance)
    # Of values next to each other (they share a random number) both go at the rate squared.
    for shift in (1, 2, 3, 4):
        both = (zeros[:, shift:] & zeros[:, :-shift]).float().mean().item()
        assert both == pytest.approx(probability**2, abs=tolerance)
    (gradient,) = torch.autograd.grad(mine.sum(), values)
    assert torch.equal(gradient, mine.detach())


def test_dropout_of_nothing_and_none() -> None:
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drop_out(values, 0.0), values)
    assert drop_out(values[:0], 0.1).shape == (0, 3)
    torch.manual_seed(6)
    first = drop_out(values, 0.5)
    torch.manual_seed(6)
    assert torch.equal(drop_out(values, 0.5), first)
