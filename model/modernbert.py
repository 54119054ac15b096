"""ModernBERT's embeddings and layer (Warner et al. 2024): pre-norm, rotary positions, gated units, no biases.

Every n-th layer attends to the whole sequence, the others to a window.
"""

# T flat slots, D hidden, H heads, K features of a head, I intermediate

import torch
import torch.nn.functional as F
from torch import nn

from model.attention import attend_projected
from model.config import ModelConfig
from model.dropout import drop_out
from model.layout import Segments
from model.rotary import Rotations


class ModernEmbeddings(nn.Module):
    """Words, LayerNorm, dropout."""

    def __init__(self, config: ModelConfig, vocab_size: int, pad_token_id: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(
            vocab_size, config.hidden_size, padding_idx=pad_token_id
        )
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.dropout = config.hidden_dropout_prob

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] -> [T, D]."""
        return drop_out(
            self.layer_norm(self.word_embeddings(input_ids)), self.dropout if self.training else 0.0
        )


class ModernLayer(nn.Module):
    """LayerNorm, self-attention, residual; LayerNorm, gated unit (Shazeer 2020), residual."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        hidden_size, eps = config.hidden_size, config.layer_norm_eps
        # The first layer's input is normalised by the embeddings.
        self.attention_norm = (
            nn.LayerNorm(hidden_size, eps=eps, bias=False) if number else nn.Identity()
        )
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.attention_output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output_norm = nn.LayerNorm(hidden_size, eps=eps, bias=False)
        self.intermediate = nn.Linear(hidden_size, 2 * config.intermediate_size, bias=False)
        self.output = nn.Linear(config.intermediate_size, hidden_size, bias=False)
        self.window = config.window_of_layer(number)
        self.num_heads = config.num_attention_heads
        self.dropout = config.hidden_dropout_prob
        self.attention_dropout = config.attention_probs_dropout_prob

    def forward(self, hidden_TD: torch.Tensor, segments: Segments, by: Rotations) -> torch.Tensor:
        """[T, D] -> [T, D]. segments: of `model.layout.lay_out`; by: of this layer's theta."""
        dropout = self.dropout if self.training else 0.0
        qkv_T3HK = self.qkv(self.attention_norm(hidden_TD)).unflatten(-1, (3, self.num_heads, -1))
        attended_TD = attend_projected(
            qkv_T3HK,
            segments,
            by,
            window=self.window,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        hidden_TD = hidden_TD + drop_out(self.attention_output(attended_TD), dropout)
        value_TI, gate_TI = self.intermediate(self.output_norm(hidden_TD)).chunk(2, dim=-1)
        return hidden_TD + drop_out(self.output(F.gelu(value_TI) * gate_TI), dropout)
