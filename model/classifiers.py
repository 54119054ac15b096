"""Features and labels in, labels of other features out: what can be read off a frozen encoder.

Two probes: a linear one (multinomial logistic regression; Alain and Bengio 2016), and the vote of the
nearest neighbours by cosine. Both are deterministic, and see standardised features.
"""

# N rows, M other rows, D features, C classes

from typing import NamedTuple

import torch
import torch.nn.functional as F

L2_GRID = (1.0, 0.1, 0.01, 0.001, 0.0001)  # strongest first: each fit begins where the last ended
CHOICE_SHARE = 5  # one in so many rows of train chooses the l2, and is then trained on, too
MAX_ITERATIONS = 200  # of each fit
NUM_NEIGHBOURS = 10
ROWS_AT_ONCE = 1024  # of similarities


class Linear(NamedTuple):
    weight: torch.Tensor  # float64 [D, C]
    bias: torch.Tensor  # float64 [C]

    def logits(self, features_ND: torch.Tensor) -> torch.Tensor:
        return features_ND @ self.weight + self.bias


def standardise(
    train_ND: torch.Tensor, other_MD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float64, with mean 0 and deviation 1 of train; features that do not vary become 0."""
    train_ND, other_MD = train_ND.double(), other_MD.double()
    mean, deviation = train_ND.mean(0), train_ND.std(0, correction=0)
    varies = deviation > 1e-12
    scale = torch.where(varies, 1 / torch.where(varies, deviation, 1.0), 0.0)
    return (train_ND - mean) * scale, (other_MD - mean) * scale


def fit_linear(
    features_ND: torch.Tensor,
    labels_N: torch.Tensor,
    num_classes: int,
    l2: float,
    start: Linear | None = None,
) -> Linear:
    """The minimum of mean cross-entropy + l2 / 2 * |weight|^2, by L-BFGS; start: where to begin."""
    if start is None:
        zeros = features_ND.new_zeros
        start = Linear(zeros(features_ND.shape[1], num_classes), zeros(num_classes))
    weight, bias = (part.clone().requires_grad_() for part in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features_ND @ weight + bias, labels_N)
        value = value + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return Linear(weight.detach(), bias.detach())


def choose_l2(
    features_ND: torch.Tensor, labels_N: torch.Tensor, num_classes: int, order_N: torch.Tensor
) -> float:
    """Of `L2_GRID` the one under which rows that were not fitted have the lowest cross-entropy.

    order_N: int64, a permutation of the rows; its first fifth is not fitted.
    """
    num_apart = max(1, len(labels_N) // CHOICE_SHARE)
    apart, rest = order_N[:num_apart], order_N[num_apart:]
    fitted, losses = None, []
    for l2 in L2_GRID:
        fitted = fit_linear(features_ND[rest], labels_N[rest], num_classes, l2, fitted)
        losses.append(F.cross_entropy(fitted.logits(features_ND[apart]), labels_N[apart]).item())
    return L2_GRID[losses.index(min(losses))]


def nearest_labels(
    train_ND: torch.Tensor, labels_N: torch.Tensor, other_MD: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """int64 [M]: the class that the `NUM_NEIGHBOURS` rows of train nearest by cosine vote for.

    A vote weighs (1 + cosine) / 2.
    """
    train_ND = F.normalize(train_ND.float(), dim=1)
    num_neighbours = min(NUM_NEIGHBOURS, len(train_ND))
    found = []
    for part in other_MD.float().split(ROWS_AT_ONCE):
        similar, index = (F.normalize(part, dim=1) @ train_ND.T).topk(num_neighbours)
        votes = torch.zeros(len(part), num_classes)
        votes.scatter_add_(1, labels_N[index], (1 + similar) / 2)
        found.append(votes.argmax(1))
    return torch.cat(found)
