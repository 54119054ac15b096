"""Hidden states in, summed losses and hits of the vocabulary out, without ever holding all logits."""

# T flat slots, D hidden, V vocabulary, C classes, R rows of logits at a time,
# M labelled slots of the batch, N labelled slots of any task

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

IGNORED = -100  # label of a slot that is not to be predicted
LOGITS_AT_ONCE = {"cpu": 1 << 26, "cuda": 1 << 27}  # numbers: 256 MB and 512 MB in fp32


class TaskLoss(NamedTuple):
    """Of one task: 0-dim tensors; sums, so that whoever accumulates batches divides by the counts of all.

    Only the loss sum carries a gradient.
    """

    loss_sum: torch.Tensor  # fp32, nats over the labels
    count: torch.Tensor  # int64, labels  # pyright: ignore[reportIncompatibleMethodOverride]
    num_correct: torch.Tensor  # int64, labels whose likeliest class is the right one


class MlmHead(nn.Module):
    """Masked language model: dense, GELU, LayerNorm, then the word embeddings and a bias.

    hidden_size: of the word embeddings; input_size: of what it reads, where that differs
    bias: of the dense layer and LayerNorm; the decoder has one always
    compile: the loss of the decoder by torch.compile, on GPUs
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        layer_norm_eps: float,
        *,
        bias: bool = True,
        input_size: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.transform = nn.Linear(input_size or hidden_size, hidden_size, bias=bias)
        self.layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps, bias=bias)
        self.decoder = Decoder(hidden_size, vocab_size)
        self.decoder.is_compiled = compile

    def tie(self, word_embeddings: nn.Embedding) -> None:
        """Make the output weights *the* word embeddings.

        One Parameter object with two owners: whatever prepares a module's own parameters before its
        forward (ZeRO-3 gathers them there) finds it in the decoder, too.
        """
        self.decoder.weight = word_embeddings.weight

    def untie(self) -> None:
        """Take the output weights away, so that a tensor of the decoder's own is never made."""
        self.decoder.register_parameter("weight", None)

    def forward(
        self,
        hidden_MD: torch.Tensor,
        labels_M: torch.Tensor | None = None,
        *,
        sample: bool = False,
    ) -> Any:
        """[M, D] -> logits [M, V] in the dtype of the weights; with labels as in `Decoder.forward`."""
        transformed_MD = self.layer_norm(F.gelu(self.transform(hidden_MD)))
        return self.decoder(transformed_MD, labels_M, sample=sample)


class Decoder(nn.Linear):
    """The projection to the vocabulary; given labels, together with its cross-entropy."""

    is_compiled = False

    def forward(
        self, input: torch.Tensor, labels_M: torch.Tensor | None = None, *, sample: bool = False
    ) -> Any:
        """Logits [M, V]; or, with labels (int64 [M]), the loss sum (fp32, nats) and hits (int64), 0-dim.

        sample: a third result, a token drawn from each row's softmax, int64 [M].
        """
        if labels_M is None:
            return super().forward(input)
        at_once = LOGITS_AT_ONCE.get(input.device.type, LOGITS_AT_ONCE["cpu"])
        rows_at_once = max(1, at_once // self.out_features)
        loss_sum, num_correct, sampled_M = LinearCrossEntropy.apply(
            input, self.weight, self.bias, labels_M, rows_at_once, sample, self.is_compiled
        )
        return (loss_sum, num_correct, sampled_M) if sample else (loss_sum, num_correct)


class LinearCrossEntropy(torch.autograd.Function):
    """sum(cross_entropy(x W^T + b, labels)), hits and samples, with the logits of a few rows at a time only.

    The gradients are computed along with the loss, while the logits are there: nothing of size M x V is
    ever kept, nothing computed twice, and the backward pass only scales them. Sums over rows are in fp32.
    """

    @staticmethod
    def forward(  # noqa: PLR0913  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden_MD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor,
        labels_M: torch.Tensor,
        rows_at_once: int,
        sample: bool,
        is_compiled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        has_grad = any(ctx.needs_input_grad[:3])
        device = hidden_MD.device
        loss_sum = torch.zeros((), dtype=torch.float32, device=device)
        num_correct = torch.zeros((), dtype=torch.int64, device=device)
        sampled_M = torch.empty_like(labels_M) if sample else labels_M.new_empty(0)
        grad_hidden = torch.empty_like(hidden_MD) if has_grad else None
        grad_weight = grad_bias = None
        lose = _compiled_loss() if is_compiled and device.type == "cuda" else loss_of_logits
        for first in range(0, len(labels_M), rows_at_once):
            rows = slice(first, first + rows_at_once)
            hidden_RD, labels_R1 = hidden_MD[rows], labels_M[rows, None]
            logits_RV = F.linear(hidden_RD, weight_VD, bias_V)
            if sample:
                sampled_M[rows] = draw(logits_RV.float())
            loss, hits, grad_RV, bias_part = lose(logits_RV, labels_R1, has_grad)
            loss_sum += loss
            num_correct += hits
            if grad_hidden is None:
                continue
            torch.mm(grad_RV, weight_VD, out=grad_hidden[rows])
            weight_part = grad_RV.t() @ hidden_RD
            if grad_weight is None or grad_bias is None:
                is_only = rows_at_once >= len(labels_M)
                grad_weight, grad_bias = weight_part if is_only else weight_part.float(), bias_part
            else:
                grad_weight += weight_part
                grad_bias += bias_part
        if grad_hidden is not None:
            if grad_weight is None:  # no rows: one number stands for all, till the backward pass
                zero = weight_VD.new_zeros(())
                grad_weight, grad_bias = zero.expand_as(weight_VD), zero.expand_as(bias_V)
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
            ctx.dtype = weight_VD.dtype
        ctx.mark_non_differentiable(num_correct, sampled_M)
        return loss_sum, num_correct, sampled_M

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        scale = grads[0]
        grad_hidden, grad_weight, grad_bias = (
            (saved * scale).to(ctx.dtype) for saved in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def loss_of_logits(
    logits_RV: torch.Tensor, labels_R1: torch.Tensor, has_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed cross-entropy (fp32, nats), hits (int64), the gradient [R, V] in the logits' dtype, and its sum
    over rows, fp32 [V]. Without has_grad the last two are empty. The logits may be overwritten.
    """
    scores_RV = logits_RV.float()
    highest_R1, best_R1 = scores_RV.max(dim=-1, keepdim=True)
    num_correct = (best_R1 == labels_R1).sum()
    right_R1 = scores_RV.gather(1, labels_R1)
    scores_RV.sub_(highest_R1).exp_()
    sum_R1 = scores_RV.sum(dim=-1, keepdim=True)
    loss_sum = (sum_R1.log() + highest_R1 - right_R1).sum()
    if not has_grad:
        return loss_sum, num_correct, scores_RV.new_empty(0), scores_RV.new_empty(0)
    grad_RV = scores_RV.div_(sum_R1)  # the probabilities, less 1 at the label
    grad_RV.scatter_add_(1, labels_R1, grad_RV.new_full((), -1.0).expand_as(labels_R1))
    return loss_sum, num_correct, grad_RV.to(logits_RV.dtype), grad_RV.sum(dim=0)


def loss_of_logits_fused(
    logits_RV: torch.Tensor, labels_R1: torch.Tensor, has_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`loss_of_logits`, written for a compiler that fuses it: the logits are read three times, and no more."""
    scores_RV = logits_RV.float()
    highest_R1, best_R1 = scores_RV.max(dim=-1, keepdim=True)
    log_sum_R1 = (scores_RV - highest_R1).exp().sum(dim=-1, keepdim=True).log() + highest_R1
    loss_sum = (log_sum_R1 - scores_RV.gather(1, labels_R1)).sum()
    num_correct = (best_R1 == labels_R1).sum()
    if not has_grad:
        return loss_sum, num_correct, scores_RV.new_empty(0), scores_RV.new_empty(0)
    classes_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    grad_RV = (scores_RV - log_sum_R1).exp() - (classes_V == labels_R1).float()
    return loss_sum, num_correct, grad_RV.to(logits_RV.dtype), grad_RV.sum(dim=0)


@functools.cache
def _compiled_loss() -> Callable[..., Any]:
    """Compiled once: micro-batches have different numbers of labels."""
    compiled = torch.compile(loss_of_logits_fused)

    def of_any_number_of_rows(logits_RV: torch.Tensor, *rest: Any) -> Any:
        torch._dynamo.maybe_mark_dynamic(logits_RV, 0)
        torch._dynamo.maybe_mark_dynamic(rest[0], 0)
        return compiled(logits_RV, *rest)

    return of_any_number_of_rows


def draw(scores_RV: torch.Tensor) -> torch.Tensor:
    """A class from each row's softmax, int64 [R], by torch's default generator: the largest of scores with
    Gumbel noise, which is -log of an exponential draw (Maddison et al. 2014, section 2).
    """
    noise_RV = torch.empty_like(scores_RV).exponential_().log_()
    return torch.sub(scores_RV, noise_RV, out=noise_RV).argmax(dim=-1)


def classify_masked(
    head: MlmHead, hidden_TD: torch.Tensor, index_M: torch.Tensor, labels_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy (fp32, nats) and hits (int64) of the masked slots, never with M x V logits.

    index_M: int64, into the T slots. No rows give 0 and 0, and zero gradients for every weight.
    `classify_rows` is the twin.
    """
    return head(hidden_TD.index_select(0, index_M), labels_M)


def classify_rows(
    head: nn.Module, hidden_TD: torch.Tensor, index_N: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy (fp32, nats) and hits (int64) of a head on the slots that have a label.

    index_N: int64, into the T slots; [N, k]: k hidden states side by side. The head sees these rows only: with
    15% masked tokens this saves 85% of the vocabulary projection. No rows give 0 and 0, and zero gradients for
    every weight.
    """
    hidden_ND = hidden_TD.index_select(0, index_N.flatten())
    if index_N.ndim > 1:
        hidden_ND = hidden_ND.unflatten(0, tuple(index_N.shape)).flatten(1)
    logits_NC = head(hidden_ND).float()
    loss_sum = F.cross_entropy(logits_NC, labels_N, reduction="sum")
    return loss_sum, (logits_NC.detach().argmax(dim=-1) == labels_N).sum()


def classify_rows_dense(
    head: nn.Module, hidden_TD: torch.Tensor, index_N: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slow twin of `classify_rows`: logits of every slot, labels that say which to ignore."""
    labels = torch.full(hidden_TD.shape[:1], IGNORED, dtype=torch.int64, device=hidden_TD.device)
    labels[index_N] = labels_N
    logits = head(hidden_TD).float()
    loss_sum = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
    return loss_sum, ((logits.argmax(dim=-1) == labels) & (labels != IGNORED)).sum()
