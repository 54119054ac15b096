"""BERT's embeddings and layer (Devlin et al. 2019): post-norm, learned positions, exact GELU.

Written for speed: one projection for queries, keys and values, flat slots without padding between.
"""

# T flat slots, D hidden, H heads, K features of a head

import torch
import torch.nn.functional as F
from torch import nn

from model.attention import attend_projected
from model.config import ModelConfig
from model.dropout import drop_out
from model.layout import Segments


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
        """Three times int64 [T] -> [T, D]."""
        hidden_TD = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        hidden_TD = self.layer_norm(hidden_TD + self.position_embeddings(position_ids))
        return drop_out(hidden_TD, self.dropout if self.training else 0.0)


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
        self.dropout = config.hidden_dropout_prob
        self.attention_dropout = config.attention_probs_dropout_prob

    def forward(self, hidden_TD: torch.Tensor, segments: Segments) -> torch.Tensor:
        """[T, D] -> [T, D]. segments: of `model.layout.lay_out`."""
        dropout = self.dropout if self.training else 0.0
        attended_TD = self.attention_output(self._attend(hidden_TD, segments))
        hidden_TD = self.attention_norm(hidden_TD + drop_out(attended_TD, dropout))
        expanded_TD = self.output(F.gelu(self.intermediate(hidden_TD)))
        return self.output_norm(hidden_TD + drop_out(expanded_TD, dropout))

    def _attend(self, hidden_TD: torch.Tensor, segments: Segments) -> torch.Tensor:
        qkv_T3HK = self.qkv(hidden_TD).unflatten(-1, (3, self.num_heads, -1))
        dropout = self.attention_dropout if self.training else 0.0
        return attend_projected(qkv_T3HK, segments, None, window=None, dropout=dropout)
