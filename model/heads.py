"""Hidden states in, summed losses and hits of both objectives out (Devlin et al. 2019, 3.1)."""

# B rows, L slots of a row, D hidden, V vocabulary, C classes,
# M masked slots of the batch, P sequence pairs of the batch, N either

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

IGNORED = -100  # label of a slot that is not to be predicted


class Losses(NamedTuple):
    """0-dim tensors; sums, so that whoever accumulates batches divides by the counts of all.

    Only the two loss sums carry gradients.
    """

    mlm_loss_sum: torch.Tensor  # fp32, nats over the masked slots
    num_masked: torch.Tensor  # int64
    num_mlm_correct: torch.Tensor  # int64, masked slots whose likeliest token is the right one
    nsp_loss_sum: torch.Tensor  # fp32, nats over the pairs
    num_pairs: torch.Tensor  # int64
    num_nsp_correct: torch.Tensor  # int64


class MlmHead(nn.Module):
    """Masked language model: dense, GELU, LayerNorm, then the word embeddings and a bias."""

    def __init__(self, vocab_size: int, hidden_size: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.transform = nn.Linear(hidden_size, hidden_size)
        self.layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.decoder = nn.Linear(hidden_size, vocab_size)

    def tie(self, word_embeddings: nn.Embedding) -> None:
        """Make the output weights *the* word embeddings.

        One Parameter object with two owners: whatever prepares a module's own parameters before its
        forward (ZeRO-3 gathers them there) finds it in the decoder, too.
        """
        self.decoder.weight = word_embeddings.weight

    def forward(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """[M, D] -> logits [M, V] in the dtype of the weights."""
        return self.decoder(self.layer_norm(F.gelu(self.transform(hidden_MD))))


class NspHead(nn.Module):
    """Next sentence prediction: BERT's pooler (dense, tanh) over [CLS], then two classes."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.pooler = nn.Linear(hidden_size, hidden_size)
        self.classifier = nn.Linear(hidden_size, 2)

    def forward(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """[P, D] of [CLS] slots -> logits [P, 2]: is next, random."""
        return self.classifier(torch.tanh(self.pooler(hidden_PD)))


def classify_rows(
    head: nn.Module, hidden_BLD: torch.Tensor, index_N: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy (fp32, nats) and hits (int64) of a head on the slots that have a label.

    index_N: int64, into the B * L slots. The head sees these rows only: with 15% masked tokens this
    saves 85% of the vocabulary projection. No rows give 0 and 0, and zero gradients for every
    weight.
    """
    logits_NC = head(hidden_BLD.flatten(0, 1).index_select(0, index_N)).float()
    loss_sum = F.cross_entropy(logits_NC, labels_N, reduction="sum")
    return loss_sum, (logits_NC.detach().argmax(dim=-1) == labels_N).sum()


def classify_rows_dense(
    head: nn.Module, hidden_BLD: torch.Tensor, index_N: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slow twin of `classify_rows`: logits of every slot, labels that say which to ignore."""
    hidden = hidden_BLD.flatten(0, 1)
    labels = torch.full(hidden.shape[:1], IGNORED, dtype=torch.int64, device=hidden.device)
    labels[index_N] = labels_N
    logits = head(hidden).float()
    loss_sum = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
    return loss_sum, ((logits.argmax(dim=-1) == labels) & (labels != IGNORED)).sum()
