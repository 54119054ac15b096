"""A batch of packed, masked rows in, the summed losses of both objectives out; for either architecture."""

# B rows, L slots of a row, T flat slots, D hidden, V vocabulary,
# M masked slots of the batch, P sequence pairs of the batch

import torch
from torch import nn

from model.bert import Embeddings, Layer
from model.checkpointing import run_layer
from model.checks import check_ranges, check_starts
from model.config import ModelConfig
from model.heads import Losses, MlmHead, NspHead, classify_masked, classify_rows
from model.layout import Layout, choose_backend, lay_out
from model.modernbert import ModernEmbeddings, ModernLayer, Rotations, rotations


class ForPreTraining(nn.Module):
    """An encoder with its masked language model and next sentence heads.

    It is built on the device of the default context without values: `model.weights` draws or loads them.
    pad_token_id: its word embedding gets no gradient from the input side.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, pad_token_id: int = 0) -> None:
        super().__init__()
        if not 0 <= pad_token_id < vocab_size:
            raise ValueError(
                f"pad_token_id {pad_token_id} is not in a vocabulary of {vocab_size} tokens"
            )
        self.config, self.vocab_size, self.pad_token_id = config, vocab_size, pad_token_id
        self.is_modern = config.architecture == "modernbert"
        num_layers, hidden_size, eps = (
            config.num_hidden_layers, config.hidden_size, config.layer_norm_eps
        )  # fmt: skip
        self.embeddings: Embeddings | ModernEmbeddings
        if self.is_modern:
            self.embeddings = ModernEmbeddings(config, vocab_size, pad_token_id)
            self.layers = nn.ModuleList(ModernLayer(config, n) for n in range(num_layers))
            self.final_norm = nn.LayerNorm(hidden_size, eps=eps, bias=False)
        else:
            self.embeddings = Embeddings(config, vocab_size, pad_token_id)
            self.layers = nn.ModuleList(Layer(config) for _ in range(num_layers))
        self.mlm_head = MlmHead(vocab_size, hidden_size, eps, bias=not self.is_modern)
        self.nsp_head = NspHead(hidden_size)
        self.tie()
        if config.compile:
            for layer in self.layers:
                layer.compile()

    def tie(self) -> None:
        """Make the output weights the word embeddings; again after the module's tensors were replaced."""
        self.mlm_head.tie(self.embeddings.word_embeddings)

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
        sequence_starts: torch.Tensor | None = None,
    ) -> Losses:
        """Summed losses of one batch.

        input_ids, token_type_ids: int64 [B, L]
        position_ids: int64 [B, L], from 0 in every packed sequence
        sequence_ids: int [B, L]: which sequence of its row a slot belongs to; -1 is padding
        masked_index, masked_labels: int64 [M]: slot in B * L, and the token that stood there
        cls_index, nsp_labels: int64 [P]: slot in B * L of a sequence's [CLS]; 0 is next, 1 random
        sequence_starts: int32, of `model.layout.find_starts`; None: found when needed

        M and P may be 0. ValueError when shapes contradict, rows are longer than the model's, or, on CPUs, a
        value is out of its range; on GPUs values are not looked at, for that would wait for the device.
        """
        for name, index, labels in (
            ("masked", masked_index, masked_labels),
            ("next sentence", cls_index, nsp_labels),
        ):
            if index.ndim != 1 or index.shape != labels.shape:
                raise ValueError(
                    f"{name} index {list(index.shape)} and labels {list(labels.shape)} differ"
                )
        self._check_shapes(input_ids, token_type_ids, position_ids, sequence_ids)
        if input_ids.device.type == "cpu":
            num_slots, vocab_size = input_ids.numel(), self.vocab_size
            types = (
                {}
                if self.is_modern
                else {"token_type_ids": (token_type_ids, self.config.type_vocab_size)}
            )
            check_ranges(
                **types,
                input_ids=(input_ids, vocab_size),
                position_ids=(position_ids, self.config.max_position_embeddings),
                masked_index=(masked_index, num_slots),
                masked_labels=(masked_labels, vocab_size),
                cls_index=(cls_index, num_slots),
                nsp_labels=(nsp_labels, 2),
            )
            check_starts(sequence_starts, num_slots)
        hidden_TD, layout = self._encode(
            input_ids, token_type_ids, position_ids, sequence_ids, sequence_starts
        )
        if layout.place is not None:
            masked_index, cls_index = layout.place[masked_index], layout.place[cls_index]
        mlm_loss_sum, num_mlm_correct = classify_masked(
            self.mlm_head, hidden_TD, masked_index, masked_labels
        )
        nsp_loss_sum, num_nsp_correct = classify_rows(
            self.nsp_head, hidden_TD, cls_index, nsp_labels
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
        """Hidden states of the last layer, [B, L, D], of no meaning at padding; the rest as in `forward`."""
        self._check_shapes(input_ids, token_type_ids, position_ids, sequence_ids)
        hidden_TD, layout = self._encode(
            input_ids, token_type_ids, position_ids, sequence_ids, None
        )
        if layout.place is not None:
            hidden_TD = hidden_TD[layout.place]
        return hidden_TD.unflatten(0, tuple(input_ids.shape))

    def mlm_logits(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """[M, D] of any slots -> logits [M, V]."""
        return self.mlm_head(hidden_MD)

    def nsp_logits(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """[P, D] of [CLS] slots -> logits [P, 2]: is next, random."""
        return self.nsp_head(hidden_PD)

    def _encode(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        position_ids: torch.Tensor,
        sequence_ids: torch.Tensor,
        sequence_starts: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Layout]:
        """[T, D], and how the batch lies in T."""
        config = self.config
        dtype = self.embeddings.layer_norm.weight.dtype
        layout = lay_out(
            sequence_ids,
            sequence_starts,
            backend=choose_backend(
                config.attention, input_ids.device, config.attention_probs_dropout_prob, dtype
            ),
            windows=config.windows,
            dtype=dtype,
        )
        ids_T, types_T, positions_T = (
            tensor.flatten() if layout.slot_T is None else tensor.flatten()[layout.slot_T]
            for tensor in (input_ids, token_type_ids, position_ids)
        )
        if isinstance(self.embeddings, ModernEmbeddings):
            hidden_TD = self.embeddings(ids_T)
        else:
            hidden_TD = self.embeddings(ids_T, types_T, positions_T)
        by = self._rotations(positions_T) if self.is_modern else {}
        for number, layer in enumerate(self.layers):
            arguments = (by[layer.window],) if isinstance(layer, ModernLayer) else ()
            hidden_TD = run_layer(config, number, layer, hidden_TD, layout.segments, *arguments)
        return (self.final_norm(hidden_TD) if self.is_modern else hidden_TD), layout

    def _rotations(self, positions_T: torch.Tensor) -> dict[int | None, Rotations]:
        config = self.config
        head_size = config.hidden_size // config.num_attention_heads
        return {
            window: rotations(
                positions_T,
                head_size,
                config.global_rope_theta if window is None else config.local_rope_theta,
            )
            for window in config.windows
        }

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
