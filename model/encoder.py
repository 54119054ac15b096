"""Rows of tokens in, hidden states of flat slots out: what the main network and a generator share."""

# B rows, L slots of a row, T flat slots, D hidden

from typing import NamedTuple

import torch
from torch import nn

from model.bert import Embeddings, Layer
from model.checkpointing import run_layer
from model.config import ModelConfig
from model.layout import Layout, choose_backend, lay_out
from model.modernbert import ModernEmbeddings, ModernLayer
from model.rotary import Rotations, rotations

PLACEHOLDER_SLOTS = 8  # of a row that is encoded where no row is to be


class Inputs(NamedTuple):
    """Rows of an encoder: integers [B, L]. See `ForPreTraining.forward`."""

    input_ids: torch.Tensor
    token_type_ids: torch.Tensor
    position_ids: torch.Tensor
    sequence_ids: torch.Tensor
    visible: torch.Tensor | None = None
    sequence_starts: torch.Tensor | None = None


def make_layers(config: ModelConfig) -> nn.ModuleList:
    layers: list[nn.Module] = [
        ModernLayer(config, number) if config.architecture == "modernbert" else Layer(config)
        for number in range(config.num_hidden_layers)
    ]
    for layer in layers:
        if config.compile:
            layer.compile()
    return nn.ModuleList(layers)


def lay_out_inputs(config: ModelConfig, inputs: Inputs, dtype: torch.dtype) -> Layout:
    """How they lie in flat slots. dtype: of the weights."""
    row_length = inputs.input_ids.shape[1]
    backend = choose_backend(config, inputs.input_ids.device, dtype, row_length)
    return lay_out(
        inputs.sequence_ids,
        inputs.sequence_starts,
        inputs.visible,
        backend=backend,
        windows=config.windows,
        dtype=dtype,
    )


def flat(values_BL: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[T]: what each flat slot shows."""
    values = values_BL.flatten()
    return values if layout.slot_T is None else values[layout.slot_T]


def embed(
    embeddings: Embeddings | ModernEmbeddings, inputs: Inputs, layout: Layout
) -> torch.Tensor:
    """[T, D]."""
    ids_T = flat(inputs.input_ids, layout)
    if isinstance(embeddings, ModernEmbeddings):
        return embeddings(ids_T)
    return embeddings(ids_T, flat(inputs.token_type_ids, layout), flat(inputs.position_ids, layout))


def run_layers(
    config: ModelConfig,
    layers: nn.ModuleList,
    hidden_TD: torch.Tensor,
    inputs: Inputs,
    layout: Layout,
) -> torch.Tensor:
    """[T, D] -> [T, D]."""
    by: dict[int | None, Rotations] = {}
    if config.architecture == "modernbert":
        by = _rotations(config, flat(inputs.position_ids, layout))
    for number, layer in enumerate(layers):
        arguments = (by[layer.window],) if isinstance(layer, ModernLayer) else ()
        hidden_TD = run_layer(config, number, layer, hidden_TD, layout.segments, *arguments)
    return hidden_TD


def _rotations(config: ModelConfig, positions_T: torch.Tensor) -> dict[int | None, Rotations]:
    return {
        window: rotations(
            positions_T,
            config.head_size,
            config.global_rope_theta if window is None else config.local_rope_theta,
        )
        for window in config.windows
    }


def rows_with(inputs: Inputs, index_N: torch.Tensor) -> tuple[Inputs, torch.Tensor]:
    """The rows that hold these slots of B * L, and the same slots, counted in those rows: int64 [N].

    Without slots some slots of the first row: every rank runs every module in every pass, else those that
    wait for its weights would wait for ever. Waits for the device where there are slots.
    """
    num_rows, length = inputs.input_ids.shape
    tensors = inputs[:5]
    if index_N.numel() == 0:
        few = (None if tensor is None else tensor[:1, :PLACEHOLDER_SLOTS] for tensor in tensors)
        return Inputs(*few), index_N  # pyright: ignore[reportArgumentType]
    row_N = index_N // length
    is_wanted = torch.zeros(num_rows, dtype=torch.int64, device=index_N.device)
    is_wanted[row_N] = 1
    rows = is_wanted.nonzero().flatten()
    chosen = (None if tensor is None else tensor[rows] for tensor in tensors)
    place = is_wanted.cumsum(0) - 1
    return Inputs(*chosen), place[row_N] * length + index_N % length  # pyright: ignore[reportArgumentType]
