"""A network's shape and a micro-batch in, the bytes that its forward and backward pass hold out. No torch.

Counted from what autograd keeps of each operation of `model.bert`, `model.modernbert` and `model.heads`, as
Korthikanti et al. 2022 (section 4) count for GPT: 34 bytes for each of T x D beside the scores, here too on
GPUs, and 36 on CPUs, where a dropout mask has the dtype of the activations. LayerNorm's statistics and
other small vectors are left out.
"""

from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig

BYTES_OF = {"bf16": 2, "fp32": 4}
LOGITS_AT_ONCE = {"cpu": 1 << 26, "cuda": 1 << 27}  # numbers, as in model.heads
BLOCKS_PAY_OFF = 4  # windows, as in model.layout
SLOT_BYTES = 28  # of a micro-batch's tensors: three int64 and one int32


@dataclass(frozen=True)
class Batch:
    """One forward pass of one rank, and what computes it."""

    micro_batch_size: int  # rows
    sequence_length: int  # slots of a row; a row that is one sequence is the dearest
    masked_fraction: float = 0.15
    precision: Literal["bf16", "fp32"] = "bf16"
    device_type: Literal["cpu", "cuda"] = "cuda"

    @property
    def num_tokens(self) -> int:
        return self.micro_batch_size * self.sequence_length

    @property
    def num_masked(self) -> int:
        return round(self.num_tokens * self.masked_fraction)

    @property
    def number_bytes(self) -> int:
        return BYTES_OF[self.precision]


def layer_bytes(model: ModelConfig, batch: Batch, layer: int) -> int:
    """What one layer keeps for its backward pass, its input among it."""
    hidden, tokens, each = model.hidden_size, batch.num_tokens, batch.number_bytes
    modern = model.architecture == "modernbert"
    # BERT: input, attention's output, two inputs of LayerNorm, what the feed-forward unit reads; ModernBERT:
    # what both LayerNorms read and write, and attention's output
    kept = 5 * hidden
    # in and out of GELU; ModernBERT: both halves, GELU of one, their product
    kept += (4 if modern else 2) * model.intermediate_size
    mask_bytes = each if batch.device_type == "cpu" else 1
    num_masks = 2 * hidden if model.hidden_dropout_prob else 0
    return tokens * (kept * each + num_masks * mask_bytes) + _attention_bytes(model, batch, layer)


def _attention_bytes(model: ModelConfig, batch: Batch, layer: int) -> int:
    """Queries, keys, values; and on CPUs the scores, of which dropout keeps two more."""
    hidden, tokens, each = model.hidden_size, batch.num_tokens, batch.number_bytes
    if batch.device_type != "cpu":  # fused: the projection, rotated queries and keys, a sum in fp32
        rotated = 2 * hidden if model.architecture == "modernbert" else 0
        return tokens * ((3 * hidden + rotated) * each + 4 * model.num_attention_heads)
    window, seen = model.window_of_layer(layer), batch.sequence_length
    numbers = 3 * hidden
    if window is not None and seen > BLOCKS_PAY_OFF * window:  # blocks of 2 windows see 4
        seen, numbers = 4 * window, 5 * hidden
    num_scores = 3 if model.attention_probs_dropout_prob else 1
    return tokens * (numbers + num_scores * model.num_attention_heads * seen) * each


def kept_bytes(model: ModelConfig, batch: Batch, layer: int) -> int:
    """What is left of a layer when the forward pass is over: less than `layer_bytes` if checkpointed."""
    mode = model.activation_checkpointing
    if mode == "none" or layer % model.checkpoint_every:
        return layer_bytes(model, batch, layer)
    numbers = model.hidden_size  # its input
    if mode == "selective":  # and the results of the four products; fused attention's too
        halves = 2 if model.architecture == "modernbert" else 1
        numbers += 5 * model.hidden_size + halves * model.intermediate_size
        if batch.device_type != "cpu":
            numbers += model.hidden_size
    return batch.num_tokens * numbers * batch.number_bytes


def is_checkpointed(model: ModelConfig, layer: int) -> bool:
    return model.activation_checkpointing != "none" and layer % model.checkpoint_every == 0


def ends_bytes(model: ModelConfig, batch: Batch) -> int:
    """Kept before the first layer and after the last: inputs, embeddings, heads."""
    hidden, tokens, each = model.hidden_size, batch.num_tokens, batch.number_bytes
    mask_bytes = each if batch.device_type == "cpu" else 1
    embedded = tokens * hidden * (each + (mask_bytes if model.hidden_dropout_prob else 0))
    last_norm = tokens * hidden * each if model.architecture == "modernbert" else 0
    heads = 4 * batch.num_masked * hidden * each
    return tokens * SLOT_BYTES + embedded + last_norm + heads


@dataclass(frozen=True)
class HeadBytes:
    """Of the masked language model's loss, whose gradients are computed along with it."""

    working: int  # logits of some rows, in fp32 and in the dtype of the weights
    gradient: int  # of the vocabulary's matrix, kept for the backward pass
    scaled: int  # its copy, times the gradient of the loss


def head_bytes(model: ModelConfig, vocab_size: int, batch: Batch) -> HeadBytes:
    rows_at_once = max(1, LOGITS_AT_ONCE[batch.device_type] // vocab_size)
    rows, each = min(batch.num_masked, rows_at_once), batch.number_bytes
    numbers = vocab_size * model.hidden_size
    logits = rows * vocab_size * (4 if each == 4 else 4 + each)
    if rows == batch.num_masked:
        return HeadBytes(logits, numbers * each, numbers * each)
    # added up in fp32 over several rounds
    return HeadBytes(logits + numbers * each, numbers * 4, numbers * (4 if each == 4 else 4 + each))


def working_bytes(model: ModelConfig, batch: Batch) -> int:
    """Gradients of activations at once, in the backward pass of a layer's feed-forward unit."""
    halves = 3 if model.architecture == "modernbert" else 1
    numbers = 2 * model.hidden_size + halves * model.intermediate_size
    return batch.num_tokens * numbers * batch.number_bytes
