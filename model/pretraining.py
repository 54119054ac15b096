"""A batch of packed rows and the targets of their tasks in, each task's summed loss out."""

# B rows, L slots of a row, T flat slots, D hidden, V vocabulary, C classes,
# M, P, N slots or sequences that have a label

import torch
from torch import nn

from model.bert import Embeddings
from model.checks import check_ranges, check_starts, check_targets, check_visible
from model.config import ModelConfig
from model.encoder import Inputs, embed, lay_out_inputs, make_layers, rows_with, run_layers
from model.generator import Generator
from model.heads import MlmHead, TaskLoss, classify_masked, classify_rows
from model.layout import Layout
from model.modernbert import ModernEmbeddings
from model.task_heads import (
    ClassHead,
    ContrastiveHead,
    CpcHead,
    ReplacedHead,
    match_partners,
    tell_replaced,
)
from model.tasks import TASKS, heads_of, label_limit

Targets = dict[str, tuple[torch.Tensor, torch.Tensor]]  # index and labels of each task


class ForPreTraining(nn.Module):
    """An encoder with the heads of its tasks.

    It is built on the device of the default context without values: `model.weights` draws or loads them.
    pad_token_id: its word embedding gets no gradient from the input side.
    """

    # of these, the ones that the tasks need
    mlm_head: MlmHead
    generator: Generator
    rtd_head: ReplacedHead
    nsp_head: ClassHead
    contrastive_head: ContrastiveHead
    cpc_head: CpcHead

    def __init__(self, config: ModelConfig, vocab_size: int, pad_token_id: int = 0) -> None:
        super().__init__()
        if not 0 <= pad_token_id < vocab_size:
            raise ValueError(
                f"pad_token_id {pad_token_id} is not in a vocabulary of {vocab_size} tokens"
            )
        self.config, self.vocab_size, self.pad_token_id = config, vocab_size, pad_token_id
        self.is_modern = config.architecture == "modernbert"
        self.embeddings: Embeddings | ModernEmbeddings
        if self.is_modern:
            self.embeddings = ModernEmbeddings(config, vocab_size, pad_token_id)
        else:
            self.embeddings = Embeddings(config, vocab_size, pad_token_id)
        self.layers = make_layers(config)
        if self.is_modern:
            self.final_norm = nn.LayerNorm(
                config.hidden_size, eps=config.layer_norm_eps, bias=False
            )
        for name in heads_of(config.tasks):
            self.add_module(name, _make_head(name, config, vocab_size))
        self.tie()

    def tie(self) -> None:
        """Make the output weights the word embeddings; again after the module's tensors were replaced."""
        for head in self._vocabulary_heads():
            head.tie(self.embeddings.word_embeddings)

    def untie(self) -> None:
        """Leave the word embeddings with one owner, until `tie`: whatever replaces tensors makes them once."""
        for head in self._vocabulary_heads():
            head.untie()

    def _vocabulary_heads(self) -> list[MlmHead]:
        return [module for module in self.modules() if isinstance(module, MlmHead)]

    def forward(  # noqa: PLR0913 - a batch, field by field: its tensors are the model's interface
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        position_ids: torch.Tensor,
        sequence_ids: torch.Tensor,
        targets: Targets,
        sequence_starts: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
    ) -> dict[str, TaskLoss]:
        """Summed losses of one batch, in the order of the configuration's tasks.

        input_ids, token_type_ids: int64 [B, L]
        position_ids: int64 [B, L], from 0 in every packed sequence
        sequence_ids: int [B, L]: which sequence of its row a slot belongs to; -1 is padding
        targets: of every task an index and labels, int64 [N] each: slots in B * L, and what is right there
            (`model.tasks`); the index of relative and cpc is [N, 2]. Labels of rtd are the tokens that really
            stand there, those of contrastive and cpc are 0. N may be 0
        sequence_starts: int32, of `model.layout.find_starts`; None: found when needed
        visible: int32 [B, L], the last slot of its row that a slot attends to, within its sequence;
            None: all of it

        ValueError when shapes contradict, rows are longer than the model's, or, on CPUs, a
        value is out of its range; on GPUs values are not looked at, for that would wait for the device.
        """
        inputs = Inputs(
            input_ids, token_type_ids, position_ids, sequence_ids, visible, sequence_starts
        )
        self._check_shapes(inputs)
        check_targets(targets, self.config.tasks)
        if input_ids.device.type == "cpu":
            self._check_values(inputs, targets)
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if "rtd" in targets:
            inputs, found["rtd_generator"] = self._replace_tokens(inputs, targets)
        hidden_TD, layout = self._encode(inputs)
        for task in self.config.tasks:  # the same on every rank
            if task == "rtd_generator":
                continue
            index, labels = targets[task]
            place = index if layout.place is None else layout.place[index]
            if task == "rtd":
                is_replaced = inputs.input_ids.flatten()[index] != labels
                found[task] = tell_replaced(self.rtd_head, hidden_TD, place, is_replaced)
            elif task == "contrastive":
                found[task] = self._contrast(hidden_TD[place], inputs, index)
            elif task == "cpc":
                found[task] = match_partners(self.cpc_head(*hidden_TD[place].unbind(1)))
            elif TASKS[task].head == "mlm_head":
                found[task] = classify_masked(self.mlm_head, hidden_TD, place, labels)
            else:
                found[task] = classify_rows(
                    self.get_submodule(TASKS[task].head), hidden_TD, place, labels
                )
        return {
            task: TaskLoss(found[task][0], _count(targets[task][1]), found[task][1])
            for task in self.config.tasks
        }

    def encode(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        position_ids: torch.Tensor,
        sequence_ids: torch.Tensor,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of the last layer, [B, L, D], of no meaning at padding; the rest as in `forward`."""
        inputs = Inputs(input_ids, token_type_ids, position_ids, sequence_ids, visible)
        self._check_shapes(inputs)
        hidden_TD, layout = self._encode(inputs)
        if layout.place is not None:
            hidden_TD = hidden_TD[layout.place]
        return hidden_TD.unflatten(0, tuple(input_ids.shape))

    def mlm_logits(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """[M, D] of any slots -> logits [M, V]."""
        return self.mlm_head(hidden_MD)

    def nsp_logits(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """[P, D] of [CLS] slots -> logits [P, 2]: is next, random."""
        return self.nsp_head(hidden_PD)

    def _encode(self, inputs: Inputs) -> tuple[torch.Tensor, Layout]:
        """[T, D], and how the batch lies in T."""
        layout = lay_out_inputs(self.config, inputs, self._dtype())
        hidden_TD = embed(self.embeddings, inputs, layout)
        hidden_TD = run_layers(self.config, self.layers, hidden_TD, inputs, layout)
        return (self.final_norm(hidden_TD) if self.is_modern else hidden_TD), layout

    def _replace_tokens(
        self, inputs: Inputs, targets: Targets
    ) -> tuple[Inputs, tuple[torch.Tensor, torch.Tensor]]:
        """The rows with samples of the generator for masked tokens; and its loss and hits.

        It reads the rows of replaced-token detection alone.
        """
        index_N, labels_N = targets["rtd_generator"]
        slots = torch.cat([targets["rtd"][0], index_N])
        rows, places = rows_with(inputs, slots)
        layout = lay_out_inputs(self.config, rows, self._dtype())  # its windows are the same
        embedded_TD = embed(self.embeddings, rows, layout)
        places_N = places[len(slots) - len(index_N) :]
        loss_sum, num_correct, sampled_N = self.generator(
            embedded_TD, rows, layout, places_N, labels_N
        )
        input_ids = inputs.input_ids.flatten().index_copy(0, index_N, sampled_N)
        return inputs._replace(input_ids=input_ids.view_as(inputs.input_ids)), (
            loss_sum,
            num_correct,
        )

    def _contrast(
        self, first_PD: torch.Tensor, inputs: Inputs, index_P: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode the rows once more, with other dropout, and tell the same sequence from the others.

        In evaluation there is no dropout: what is left is how far apart the sequences are.
        """
        rows, place_P = rows_with(inputs, index_P)
        hidden_TD, layout = self._encode(rows)
        if layout.place is not None:
            place_P = layout.place[place_P]
        return match_partners(self.contrastive_head(first_PD, hidden_TD[place_P]))

    def _dtype(self) -> torch.dtype:
        return self.embeddings.layer_norm.weight.dtype

    def _check_shapes(self, inputs: Inputs) -> None:
        shape = inputs.input_ids.shape
        if len(shape) != 2 or any(other.shape != shape for other in inputs[1:4]):  # pyright: ignore[reportOptionalMemberAccess]
            shapes = [list(tensor.shape) for tensor in inputs[:4]]  # pyright: ignore[reportOptionalMemberAccess]
            raise ValueError(
                "input_ids, token_type_ids, position_ids and sequence_ids must have one shape "
                f"[rows, length], not {', '.join(map(str, shapes))}"
            )
        longest = self.config.max_position_embeddings
        if shape[1] > longest:
            raise ValueError(f"rows of {shape[1]} slots are over max_position_embeddings {longest}")

    def _check_values(self, inputs: Inputs, targets: Targets) -> None:
        limits = {
            "input_ids": (inputs.input_ids, self.vocab_size),
            "position_ids": (inputs.position_ids, self.config.max_position_embeddings),
        }
        if not self.is_modern:
            limits["token_type_ids"] = (inputs.token_type_ids, self.config.type_vocab_size)
        for task, (index, labels) in targets.items():
            limits[f"{task}_index"] = (index, inputs.input_ids.numel())
            limits[f"{task}_labels"] = (labels, label_limit(task, self.vocab_size))
        check_ranges(**limits)
        check_starts(inputs.sequence_starts, inputs.input_ids.numel())
        check_visible(inputs.visible, inputs.sequence_ids)


def _make_head(name: str, config: ModelConfig, vocab_size: int) -> nn.Module:
    hidden_size, is_modern = config.hidden_size, config.architecture == "modernbert"
    if name == "mlm_head":
        return MlmHead(
            vocab_size, hidden_size, config.layer_norm_eps,
            bias=not is_modern, compile=config.compile,
        )  # fmt: skip
    if name == "generator":
        return Generator(config, vocab_size)
    if name == "rtd_head":
        return ReplacedHead(hidden_size)
    if name == "contrastive_head":
        return ContrastiveHead(hidden_size)
    if name == "cpc_head":
        return CpcHead(hidden_size)
    task = next(task for task in TASKS.values() if task.head == name)
    return ClassHead(hidden_size, task.num_classes, task.index_width)


def _count(labels: torch.Tensor) -> torch.Tensor:
    return torch.full((), labels.numel(), dtype=torch.int64, device=labels.device)
