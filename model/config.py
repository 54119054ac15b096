"""The shape of a network and how it is computed: what the `model` section of a preset says."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from model.tasks import DEFAULT_TASKS, TASKS, task_problems

Architecture = Literal["bert", "modernbert"]
Backend = Literal["auto", "grouped", "sdpa", "eager", "short_rows", "varlen", "flash", "flex"]
Checkpointing = Literal["none", "full", "selective"]
WITHOUT_DROPOUT = ("flex",)  # backends whose kernels cannot drop probabilities out
# Fields that say how the network is computed, not what it is.
COMPUTE_FIELDS = ("attention", "activation_checkpointing", "checkpoint_every", "compile")
# Fields that say which heads there are.
TASK_FIELDS = ("tasks", "generator_divisor")
MOST = {  # far above any network, and below what numbers of parameters can be counted with
    "num_hidden_layers": 400, "type_vocab_size": 1000,
    **dict.fromkeys(("hidden_size", "intermediate_size", "max_position_embeddings"), 1 << 20),
}  # fmt: skip
MODERN_FIELDS = (
    "global_attention_every", "local_attention", "global_rope_theta", "local_rope_theta",
)  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network, under Hugging Face's BERT names. The defaults are BERT-base.

    The vocabulary is not here: its size is the dataset's. ValueError, with all problems, where
    values contradict.
    """

    architecture: Architecture = "bert"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072  # modernbert: of each half of the gated unit
    max_position_embeddings: int = (
        512  # modernbert: the longest row, for its positions are rotations
    )
    type_vocab_size: int = 2  # bert's alone
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    # modernbert's alone: every n-th layer, from the first, attends globally, the others to a window
    global_attention_every: int = 3
    local_attention: int = 128  # tokens in the window, half of them to each side
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    # losses that it is trained with (`model.tasks`): there are heads for these
    tasks: tuple[str, ...] = DEFAULT_TASKS
    generator_divisor: int = 4  # rtd_generator: of hidden_size, heads and intermediate_size
    # how it is computed
    attention: Backend = "auto"
    activation_checkpointing: Checkpointing = (
        "none"  # "full": recompute; "selective": keep products
    )
    checkpoint_every: int = 1  # of the layers, every n-th is checkpointed
    compile: bool = False  # each layer by torch.compile, on GPUs the vocabulary's loss too

    def __post_init__(self) -> None:
        problems = self._range_problems()
        for name, choices in (
            ("architecture", Architecture), ("attention", Backend),
            ("activation_checkpointing", Checkpointing),
        ):  # fmt: skip
            if getattr(self, name) not in get_args(choices):
                problems.append(
                    f"{name} {getattr(self, name)!r} is not one of {', '.join(get_args(choices))}"
                )
        problems += self._architecture_problems()
        problems += task_problems(self.tasks) or self._generator_problems()
        if self.attention in WITHOUT_DROPOUT and self.attention_probs_dropout_prob:
            problems.append(
                f"attention {self.attention!r} cannot drop out: it needs attention_probs_dropout_prob 0, "
                f"not {self.attention_probs_dropout_prob}"
            )
        if self.checkpoint_every > 1 and self.activation_checkpointing == "none":
            problems.append(
                f"checkpoint_every {self.checkpoint_every} does nothing with activation_checkpointing 'none'"
            )
        if problems:
            raise ValueError("model: " + "; ".join(problems))

    def _range_problems(self) -> list[str]:
        problems = [
            f"{name} {getattr(self, name)} is below 1"
            for name in (
                "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                "max_position_embeddings", "type_vocab_size", "global_attention_every",
                "local_attention", "checkpoint_every", "generator_divisor",
            )
            if getattr(self, name) < 1
        ]  # fmt: skip
        problems += [
            f"{name} {getattr(self, name)} is above {most}"
            for name, most in MOST.items()
            if getattr(self, name) > most
        ]
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} {getattr(self, name)} is not in [0, 1)")
        for name in (
            "layer_norm_eps",
            "initializer_range",
            "global_rope_theta",
            "local_rope_theta",
        ):
            if not getattr(self, name) > 0:
                problems.append(f"{name} {getattr(self, name)} is not above 0")
        return problems

    def _architecture_problems(self) -> list[str]:
        if self.architecture == "bert":
            if self.type_vocab_size < 2:
                return [f"type_vocab_size {self.type_vocab_size} is below 2: rows are of pairs"]
            defaults = ModelConfig.__dataclass_fields__
            return [
                f"{name} {getattr(self, name)} is of architecture modernbert, not of bert"
                for name in MODERN_FIELDS
                if getattr(self, name) != defaults[name].default
            ]
        problems = []
        if self.type_vocab_size != 2:
            problems.append(
                f"type_vocab_size {self.type_vocab_size} is of bert: modernbert has no types"
            )
        if self.local_attention % 2:
            problems.append(f"local_attention {self.local_attention} is odd: half is to each side")
        if self.num_attention_heads > 0 and self.hidden_size // self.num_attention_heads % 2:
            problems.append(
                "modernbert rotates pairs of features: each head must have an even number"
            )
        return problems

    def _generator_problems(self) -> list[str]:
        divisor = self.generator_divisor
        if "rtd_generator" not in self.tasks or divisor < 1:
            return []
        return [
            f"{name} {getattr(self, name)} is not a multiple of generator_divisor {divisor}"
            for name in ("hidden_size", "num_attention_heads", "intermediate_size")
            if getattr(self, name) % divisor
        ]

    @property
    def head_size(self) -> int:
        """Features of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def is_causal(self) -> bool:
        """Whether rows may come in which a slot does not see all of its sequence."""
        return any(TASKS[task].is_causal for task in self.tasks)

    def generator(self) -> "ModelConfig":
        """The shape of the generator of replaced tokens: as many layers, narrower."""
        divisor = self.generator_divisor
        return replace(
            self,
            hidden_size=self.hidden_size // divisor,
            num_attention_heads=self.num_attention_heads // divisor,
            intermediate_size=self.intermediate_size // divisor,
            tasks=("mlm",),
        )

    def window_of_layer(self, layer: int) -> int | None:
        """Tokens to each side that a layer attends to; None: all of the sequence."""
        if self.architecture == "bert" or layer % self.global_attention_every == 0:
            return None
        return self.local_attention // 2

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of all layers, each once."""
        return tuple(dict.fromkeys(map(self.window_of_layer, range(self.num_hidden_layers))))
