"""Embedded rows with masks in, the loss of a small masked language model and its samples out (ELECTRA)."""

# B rows, L slots of a row, T flat slots, D hidden, N masked slots

import torch
from torch import nn

from model.config import ModelConfig
from model.encoder import Inputs, make_layers, run_layers
from model.heads import MlmHead
from model.layout import Layout


class Generator(nn.Module):
    """The generator of replaced tokens (Clark et al. 2020, 3.1 and 3.2).

    As many layers as the main network, each `generator_divisor` times narrower. It reads the main network's
    embeddings, LayerNorm and dropout included, through a projection, and its head leads back to their
    width: the word embeddings are its output weights, too.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config.generator()
        is_modern = config.architecture == "modernbert"
        wide, narrow, eps = config.hidden_size, self.config.hidden_size, config.layer_norm_eps
        self.projection = nn.Linear(wide, narrow, bias=not is_modern)
        self.layers = make_layers(self.config)
        self.final_norm = nn.LayerNorm(narrow, eps=eps, bias=False) if is_modern else nn.Identity()
        self.mlm_head = MlmHead(
            vocab_size, wide, eps,
            bias=not is_modern, input_size=narrow, compile=config.compile,
        )  # fmt: skip

    def forward(
        self,
        embedded_TD: torch.Tensor,
        inputs: Inputs,
        layout: Layout,
        index_N: torch.Tensor,
        labels_N: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Summed loss (fp32, nats), hits (int64), and a sample of each slot's softmax (int64 [N]).

        index_N: int64, of the B * L slots of `inputs`; labels_N: the tokens that stood there. The samples
        are drawn by torch's default generator of the device, and carry no gradient.
        """
        hidden = run_layers(self.config, self.layers, self.projection(embedded_TD), inputs, layout)
        hidden = self.final_norm(hidden)
        if layout.place is not None:
            index_N = layout.place[index_N]
        return self.mlm_head(hidden.index_select(0, index_N), labels_N, sample=True)
