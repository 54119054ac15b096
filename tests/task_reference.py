"""A batch of rows in, every task's loss out, as slowly and plainly as its formula: what tests compare with.

Each sequence alone, no packing; the equation of attention with a mask for each sequence; logits of every slot.
"""

from typing import Any

import torch
import torch.nn.functional as F

from model.pretraining import ForPreTraining
from model.rotary import rotate, rotations

VOCABULARY = (
    "mlm", "wwm", "span", "ngram", "static_mlm", "clm", "prefix_lm", "denoise", "word_order",
)  # fmt: skip


def attention(layer: Any, hidden: torch.Tensor, allowed: torch.Tensor, by: Any) -> torch.Tensor:
    """One sequence, [n, D]; allowed: bool [n, n]."""
    query, key, value = layer.qkv(hidden).unflatten(-1, (3, layer.num_heads, -1)).unbind(1)
    if by is not None:
        query, key = rotate(query, by), rotate(key, by)
    scores = torch.einsum("qhk,phk->hqp", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("hqp,phk->qhk", weights, value).flatten(1)


def through_layers(
    config: Any, layers: Any, hidden: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """visible: int64 [n], counted within the sequence."""
    slots = torch.arange(len(hidden))
    for layer in layers:
        allowed, by = slots <= visible[:, None], None
        if config.architecture == "modernbert":
            theta = config.global_rope_theta if layer.window is None else config.local_rope_theta
            by = rotations(slots, config.hidden_size // config.num_attention_heads, theta)
            if layer.window is not None:
                allowed = allowed & ((slots[:, None] - slots).abs() <= layer.window)
            seen = attention(layer, layer.attention_norm(hidden), allowed, by)
            hidden = hidden + layer.attention_output(seen)
            value, gate = layer.intermediate(layer.output_norm(hidden)).chunk(2, -1)
            hidden = hidden + layer.output(F.gelu(value) * gate)
        else:
            seen = layer.attention_output(attention(layer, hidden, allowed, by))
            hidden = layer.attention_norm(hidden + seen)
            expanded = layer.output(F.gelu(layer.intermediate(hidden)))
            hidden = layer.output_norm(hidden + expanded)
    return hidden


class Reference:
    """The model's weights, used plainly. Dropout must be 0."""

    def __init__(self, model: ForPreTraining) -> None:
        self.model, self.config = model, model.config

    def encode(self, batch: dict[str, Any], *, by_generator: bool = False) -> torch.Tensor:
        """Hidden states of all slots, [B * L, D], 0 at padding."""
        model, ids = self.model, batch["sequence_ids"]
        length = ids.shape[1]
        width = self.config.generator().hidden_size if by_generator else self.config.hidden_size
        rows = []
        for row in range(len(ids)):
            states = torch.zeros(length, width)
            for number in range(int(ids[row].max()) + 1):
                slots = (ids[row] == number).nonzero().flatten()
                visible = torch.full((len(slots),), len(slots))
                if batch.get("visible") is not None:
                    visible = batch["visible"][row, slots].long() - slots[0]
                given = [
                    batch[name][row, slots]
                    for name in ("input_ids", "token_type_ids", "position_ids")
                ]
                hidden = model.embeddings(*(given[:1] if model.is_modern else given))
                if by_generator:
                    small = model.generator
                    hidden = small.projection(hidden)
                    hidden = through_layers(small.config, small.layers, hidden, visible)
                    hidden = small.final_norm(hidden)
                else:
                    hidden = through_layers(self.config, model.layers, hidden, visible)
                    hidden = model.final_norm(hidden) if model.is_modern else hidden
                states = states.index_copy(0, slots, hidden)
            rows.append(states)
        return torch.cat(rows)

    def vocabulary(self, head: Any, hidden: torch.Tensor) -> torch.Tensor:
        words = self.model.embeddings.word_embeddings.weight
        transformed = head.layer_norm(F.gelu(head.transform(hidden)))
        return transformed @ words.t() + head.decoder.bias

    def losses(self, batch: dict[str, Any], tasks: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Of each task. The generator's samples are drawn by torch's default generator, as the model's."""
        found, targets, model = {}, batch["targets"], self.model
        if "rtd" in tasks:
            index, labels = targets["rtd_generator"]
            logits = self.vocabulary(
                model.generator.mlm_head, self.encode(batch, by_generator=True)
            )
            found["rtd_generator"] = -logits.log_softmax(-1)[index, labels].sum()
            noise = torch.empty(len(index), logits.shape[1]).exponential_()
            samples = (logits[index].detach().softmax(-1) / noise).argmax(-1)
            ids = batch["input_ids"].clone()
            ids.view(-1)[index] = samples
            batch = batch | {"input_ids": ids}
        hidden = self.encode(batch)
        for task in tasks:
            index, labels = targets[task]
            if task in VOCABULARY:
                logits = self.vocabulary(model.mlm_head, hidden)
                found[task] = -logits.log_softmax(-1)[index, labels].sum()
            elif task == "rtd":
                head = model.rtd_head
                score = head.classifier(F.gelu(head.dense(hidden)))[index, 0]
                replaced = batch["input_ids"].flatten()[index] != labels
                found[task] = -torch.where(replaced, score, -score).sigmoid().log().sum()
            elif task == "contrastive":  # without dropout the second view is the first
                views = model.contrastive_head.dense(hidden[index]).tanh()
                scores = torch.cosine_similarity(views[:, None], views[None], dim=-1) / 0.05
                found[task] = -scores.log_softmax(-1).diagonal().sum()
            elif task == "cpc":
                context, following = hidden[index[:, 0]], hidden[index[:, 1]]
                scores = context @ model.cpc_head.bilinear.weight.t() @ following.t()
                found[task] = -scores.log_softmax(-1).diagonal().sum()
            elif task != "rtd_generator":
                head: Any = model.get_submodule(f"{task}_head")
                states = hidden[index] if index.ndim == 1 else hidden[index].flatten(1)
                logits = head.classifier(head.pooler(states).tanh())
                found[task] = -logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum()
        return {task: found[task] for task in tasks}
