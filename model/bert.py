"""BERT (Devlin et al. 2019): a batch of packed, masked rows in, the summed losses out.

The architecture is the published one: post-norm, learned positions, exact GELU, tied output
embeddings. Written for speed: one projection for queries, keys and values, and heads that see
labelled rows only.
"""

# B rows, L slots of a row, D hidden, H heads, K features of a head, V vocabulary,
# M masked slots of the batch, P sequence pairs of the batch

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.attention import Backend, attend, sequence_mask
from model.dropout import drop_out
from model.heads import Losses, MlmHead, NspHead, classify_rows

Checkpointing = Literal["none", "full"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network, under Hugging Face's names. The defaults are BERT-base.

    The vocabulary is not here: its size is the dataset's. ValueError, with all problems, where
    values contradict.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    attention: Backend = "sdpa"  # "eager" trains faster on CPUs
    activation_checkpointing: Checkpointing = (
        "none"  # "full" recomputes each layer in the backward pass
    )

    def __post_init__(self) -> None:
        problems = [
            f"{name} {getattr(self, name)} is below 1"
            for name in (
                "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                "max_position_embeddings", "type_vocab_size",
            )
            if getattr(self, name) < 1
        ]  # fmt: skip
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} {getattr(self, name)} is not in [0, 1)")
        for name in ("layer_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                problems.append(f"{name} {getattr(self, name)} is not above 0")
        for name, choices in (("attention", Backend), ("activation_checkpointing", Checkpointing)):
            if getattr(self, name) not in get_args(choices):
                problems.append(
                    f"{name} {getattr(self, name)!r} is not one of {', '.join(get_args(choices))}"
                )
        if problems:
            raise ValueError("model: " + "; ".join(problems))


class Embeddings(nn.Module):
    """Word + position + token type, LayerNorm, dropout."""

    def __init__(self, config: ModelConfig, vocab_size: int, pad_token_id: int) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size, padding_idx=pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden_size)
        self.layer_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """Three times int64 [B, L] -> [B, L, D]."""
        hidden_BLD = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        hidden_BLD = self.layer_norm(hidden_BLD + self.position_embeddings(position_ids))
        return drop_out(hidden_BLD, self.dropout if self.training else 0.0)


class Layer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, the residual and LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_output = nn.Linear(hidden_size, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.num_heads = config.num_attention_heads
        self.backend: Backend = config.attention
        self.dropout = config.hidden_dropout_prob
        self.attention_dropout = config.attention_probs_dropout_prob

    def forward(self, hidden_BLD: torch.Tensor, mask_B1LL: torch.Tensor) -> torch.Tensor:
        """[B, L, D] -> [B, L, D]. mask_B1LL: of `model.attention.sequence_mask`."""
        dropout = self.dropout if self.training else 0.0
        attended_BLD = self.attention_output(self._attend(hidden_BLD, mask_B1LL))
        hidden_BLD = self.attention_norm(hidden_BLD + drop_out(attended_BLD, dropout))
        expanded_BLD = self.output(F.gelu(self.intermediate(hidden_BLD)))
        return self.output_norm(hidden_BLD + drop_out(expanded_BLD, dropout))

    def _attend(self, hidden_BLD: torch.Tensor, mask_B1LL: torch.Tensor) -> torch.Tensor:
        qkv_BL3HK = self.qkv(hidden_BLD).unflatten(-1, (3, self.num_heads, -1))
        query_BHLK, key_BHLK, value_BHLK = qkv_BL3HK.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attention_dropout if self.training else 0.0
        attended_BHLK = attend(
            query_BHLK, key_BHLK, value_BHLK, mask_B1LL, dropout=dropout, backend=self.backend
        )
        return attended_BHLK.transpose(1, 2).flatten(2)


class BertForPreTraining(nn.Module):
    """BERT with its masked language model and next sentence heads. Freshly initialised from `seed`.

    pad_token_id: its word embedding gets no gradient from the input side.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, pad_token_id: int = 0, *, seed: int = 0
    ) -> None:
        super().__init__()
        if not 0 <= pad_token_id < vocab_size:
            raise ValueError(
                f"pad_token_id {pad_token_id} is not in a vocabulary of {vocab_size} tokens"
            )
        self.config, self.vocab_size, self.pad_token_id = config, vocab_size, pad_token_id
        with torch.device("meta"):  # weights are drawn once, by `initialize`
            self.embeddings = Embeddings(config, vocab_size, pad_token_id)
            self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
            self.mlm_head = MlmHead(vocab_size, config.hidden_size, config.layer_norm_eps)
            self.nsp_head = NspHead(config.hidden_size)
            self.mlm_head.tie(self.embeddings.word_embeddings)
        self.to_empty(device=torch.get_default_device())
        self.mlm_head.tie(self.embeddings.word_embeddings)
        initialize(self, seed)

    def forward(  # noqa: PLR0913 - a batch, field by field: its tensors are the model's interface
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        position_ids: torch.Tensor,
        sequence_ids: torch.Tensor,
        masked_index: torch.Tensor,
        masked_labels: torch.Tensor,
        cls_index: torch.Tensor,
        nsp_labels: torch.Tensor,
    ) -> Losses:
        """Summed losses of one batch.

        input_ids, token_type_ids: int64 [B, L]
        position_ids: int64 [B, L], from 0 in every packed sequence
        sequence_ids: int [B, L]: which sequence of its row a slot belongs to; -1 is padding
        masked_index, masked_labels: int64 [M]: slot in B * L, and the token that stood there
        cls_index, nsp_labels: int64 [P]: slot in B * L of a sequence's [CLS]; 0 is next, 1 random

        M and P may be 0. ValueError when shapes contradict or rows are longer than the position
        embeddings; values are not looked at, for that would wait for the device.
        """
        for name, index, labels in (
            ("masked", masked_index, masked_labels),
            ("next sentence", cls_index, nsp_labels),
        ):
            if index.ndim != 1 or index.shape != labels.shape:
                raise ValueError(
                    f"{name} index {list(index.shape)} and labels {list(labels.shape)} differ"
                )
        hidden_BLD = self.encode(input_ids, token_type_ids, position_ids, sequence_ids)
        mlm_loss_sum, num_mlm_correct = classify_rows(
            self.mlm_head, hidden_BLD, masked_index, masked_labels
        )
        nsp_loss_sum, num_nsp_correct = classify_rows(
            self.nsp_head, hidden_BLD, cls_index, nsp_labels
        )
        return Losses(
            mlm_loss_sum,
            _count(masked_index),
            num_mlm_correct,
            nsp_loss_sum,
            _count(cls_index),
            num_nsp_correct,
        )

    def encode(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        position_ids: torch.Tensor,
        sequence_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states of the last layer, [B, L, D]; arguments and errors as in `forward`."""
        self._check_shapes(input_ids, token_type_ids, position_ids, sequence_ids)
        hidden_BLD = self.embeddings(input_ids, token_type_ids, position_ids)
        mask_B1LL = sequence_mask(sequence_ids, hidden_BLD.dtype)
        recompute = self.config.activation_checkpointing == "full" and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                hidden_BLD = checkpoint(layer, hidden_BLD, mask_B1LL, use_reentrant=False)
            else:
                hidden_BLD = layer(hidden_BLD, mask_B1LL)
        return hidden_BLD

    def mlm_logits(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """[M, D] of any slots -> logits [M, V]."""
        return self.mlm_head(hidden_MD)

    def nsp_logits(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """[P, D] of [CLS] slots -> logits [P, 2]: is next, random."""
        return self.nsp_head(hidden_PD)

    def _check_shapes(self, input_ids: torch.Tensor, *others: torch.Tensor) -> None:
        shape = input_ids.shape
        if len(shape) != 2 or any(other.shape != shape for other in others):
            shapes = [list(tensor.shape) for tensor in (input_ids, *others)]
            raise ValueError(
                "input_ids, token_type_ids, position_ids and sequence_ids must have one shape "
                f"[rows, length], not {', '.join(map(str, shapes))}"
            )
        longest = self.config.max_position_embeddings
        if shape[1] > longest:
            raise ValueError(f"rows of {shape[1]} slots are over max_position_embeddings {longest}")


def _count(index: torch.Tensor) -> torch.Tensor:
    return torch.full((), index.numel(), dtype=torch.int64, device=index.device)


@torch.no_grad()
def initialize(model: BertForPreTraining, seed: int) -> None:
    """Draw fresh weights: the same for the same seed and shape, on any device.

    Matrices and embeddings: normal with standard deviation initializer_range, drawn anew beyond two
    of them (0.0176 in effect for 0.02), as in the authors' own code; Hugging Face's BERT does not
    truncate, and sets the padding token's embedding to 0. LayerNorm: 1 and 0. Biases: 0.
    """
    generator = torch.Generator().manual_seed(seed)
    deviation = model.config.initializer_range
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        if parameter.ndim >= 2:
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            nn.init.trunc_normal_(drawn, 0.0, deviation, -2 * deviation, 2 * deviation, generator)
            parameter.copy_(drawn)
        else:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)


def parameter_shapes(config: ModelConfig, vocab_size: int) -> dict[str, torch.Size]:
    """Every weight's name and shape, in the model's order; the tied decoder is not named twice."""
    with torch.device("meta"):
        model = BertForPreTraining(config, vocab_size)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def weight_problems(
    weights: Mapping[str, torch.Tensor],
    shapes: Mapping[str, torch.Size],
    *,
    may_miss: Collection[str] = (),
) -> list[str]:
    """What keeps `weights` from being those of `shapes`: missing, unknown, wrongly shaped."""
    problems = [
        f"{name} is missing" for name in shapes if name not in weights and name not in may_miss
    ]
    problems += [f"{name} is unknown" for name in weights if name not in shapes]
    return problems + [
        f"{name} has shape {list(weights[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]


@torch.no_grad()
def load_weights(
    model: BertForPreTraining,
    weights: Mapping[str, torch.Tensor],
    *,
    may_miss: Collection[str] = (),
) -> None:
    """Copy weights, named as in `named_parameters`, into the model.

    may_miss: names that may be absent; these weights of the model stay as they are.

    ValueError, naming all of them, for missing, unknown and wrongly shaped weights; nothing is
    changed then.
    """
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    if problems := weight_problems(weights, shapes, may_miss=may_miss):
        raise ValueError("weights do not fit the model: " + "; ".join(problems))
    for name, value in weights.items():
        parameters[name].copy_(value)
