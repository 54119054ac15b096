"""Hidden states and targets of one task in, its summed loss and hits out: all heads but the vocabulary's."""

# T flat slots, D hidden, C classes, P sequences or pairs of the micro-batch, N labels

import torch
import torch.nn.functional as F
from torch import nn

from model.tasks import TEMPERATURE


class ClassHead(nn.Module):
    """BERT's pooler (dense, tanh) over [CLS], then a few classes (Devlin et al. 2019).

    num_slots: of which hidden states one label is; they are laid side by side.
    """

    def __init__(self, hidden_size: int, num_classes: int, num_slots: int = 1) -> None:
        super().__init__()
        self.pooler = nn.Linear(num_slots * hidden_size, hidden_size)
        self.classifier = nn.Linear(hidden_size, num_classes)

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """[N, slots * D] -> logits [N, C]."""
        return self.classifier(torch.tanh(self.pooler(hidden_ND)))


class ReplacedHead(nn.Module):
    """Whether a token was replaced: dense, GELU, one logit (Clark et al. 2020); positive is replaced."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.classifier = nn.Linear(hidden_size, 1)

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """[N, D] -> logits [N]."""
        return self.classifier(F.gelu(self.dense(hidden_ND))).squeeze(-1)


class ContrastiveHead(nn.Module):
    """The projection of the contrastive loss: dense, tanh (Gao et al. 2021), for training only.

    Whoever uses sentence vectors takes [CLS] without it, as they do.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, first_PD: torch.Tensor, second_PD: torch.Tensor) -> torch.Tensor:
        """Two views of P sequences -> fp32 [P, P]: cosine of each with each, over the temperature."""
        first, second = (
            F.normalize(torch.tanh(self.dense(view)).float(), dim=-1)
            for view in (first_PD, second_PD)
        )
        return first @ second.t() / TEMPERATURE


class CpcHead(nn.Module):
    """The bilinear score of a context and what follows it (van den Oord et al. 2018, log of equation 3)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.bilinear = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, context_PD: torch.Tensor, next_PD: torch.Tensor) -> torch.Tensor:
        """Twice [P, D] -> fp32 [P, P]: of each context with each that follows one."""
        return self.bilinear(context_PD).float() @ next_PD.float().t()


def tell_replaced(
    head: ReplacedHead, hidden_TD: torch.Tensor, index_N: torch.Tensor, is_replaced_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed binary cross-entropy (fp32, nats) and hits (int64). is_replaced_N: bool."""
    logits_N = head(hidden_TD.index_select(0, index_N)).float()
    loss_sum = F.binary_cross_entropy_with_logits(logits_N, is_replaced_N.float(), reduction="sum")
    return loss_sum, ((logits_N.detach() > 0) == is_replaced_N).sum()


def match_partners(scores_PP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE: summed -log softmax of each row at its own column (fp32, nats), and hits (int64).

    A row is a hit where no other column scores more. No rows give 0 and 0.
    """
    own_P = scores_PP.diagonal()
    loss_sum = (scores_PP.logsumexp(dim=1) - own_P).sum()
    num_higher_P = (scores_PP.detach() > own_P.detach()[:, None]).sum(dim=1)
    return loss_sum, (num_higher_P == 0).sum()
