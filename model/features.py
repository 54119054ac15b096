"""Token ids of sentences or pairs in, two features of each out: what a frozen encoder makes of them.

Sequences are sorted by length, so that rows computed together have little padding.
"""

# B rows, L slots of a row, N sequences, D hidden

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from model.from_hf import load_model
from model.pretraining import ForPreTraining

SLOTS_PER_BATCH = 1 << 13


class Features(NamedTuple):
    """fp32 [N, D] each, of the last layer."""

    mean: torch.Tensor  # over all tokens of the sequence, [CLS] and [SEP] too
    cls: torch.Tensor  # of the first token


def load_encoder(folder: Path) -> ForPreTraining:
    """The model of a Hugging Face folder, on CPUs in fp32, without dropout. ValueError as of `import_hf`.

    Heads that the folder lacks are of no meaning; no feature uses them.
    """
    cpu = torch.device("cpu")
    model, _ = load_model(folder, device=cpu, dtype=torch.float32, attention="sdpa")
    return model


@torch.inference_mode()
def encode(
    model: ForPreTraining, input_ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]]
) -> Features:
    """Features of N sequences, in their order; none may be empty, or longer than the model's rows.

    types: of each token, 0 or 1; ModernBERT has none, and does not look at them.
    """
    lengths = torch.tensor([len(ids) for ids in input_ids])
    order = torch.argsort(lengths, descending=True, stable=True).tolist()
    size = model.config.hidden_size
    features = Features(*(torch.empty(len(input_ids), size) for _ in Features._fields))
    first = 0
    while first < len(order):
        longest = len(input_ids[order[first]])
        rows = order[first : first + max(1, SLOTS_PER_BATCH // longest)]
        first += len(rows)
        hidden_BLD, is_token_BL = _encode_rows(
            model, [input_ids[row] for row in rows], [types[row] for row in rows], longest
        )
        summed_BD = hidden_BLD.masked_fill(~is_token_BL[:, :, None], 0.0).sum(1)
        features.mean[rows] = summed_BD / is_token_BL.sum(1, keepdim=True)
        features.cls[rows] = hidden_BLD[:, 0]
    return features


def _encode_rows(
    model: ForPreTraining,
    input_ids: list[Sequence[int]],
    types: list[Sequence[int]],
    longest: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L, D], of no meaning at padding, and bool [B, L]: which slots are tokens."""
    ids_BL = torch.zeros(len(input_ids), longest, dtype=torch.int64)
    types_BL = torch.zeros_like(ids_BL)
    is_token_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
    for row, (ids, kinds) in enumerate(zip(input_ids, types, strict=True)):
        ids_BL[row, : len(ids)] = torch.tensor(ids)
        types_BL[row, : len(ids)] = torch.tensor(kinds)
        is_token_BL[row, : len(ids)] = True
    positions_BL = torch.arange(longest).expand_as(ids_BL)
    sequence_ids_BL = is_token_BL.long() - 1  # 0 is the row's sequence, -1 padding
    return model.encode(ids_BL, types_BL, positions_BL, sequence_ids_BL), is_token_BL
