"""A model's shape and tasks in, the README of its exported folder out."""

from model.config import ModelConfig
from model.hf_kinds import kind_of
from model.tasks import DEFAULT_TASKS, TASKS, heads_of

CAUSAL_NOTE = """
## Causal rows

Some rows of its training were causal, whole or after a prefix ({tasks}): there a token saw no later one but
those of the prefix. Attention of `{hf_class}` is bidirectional, as in all other rows; the network is the same.
"""


def card_of(text: str | None, config: ModelConfig, vocab_size: int) -> str:
    """Markdown: `text`, or a short one where it is None; with a note, once, on rows that were causal."""
    text = text or _short_card(config, vocab_size)
    tasks = ", ".join(task for task in config.tasks if TASKS[task].is_causal)
    note = CAUSAL_NOTE.format(tasks=tasks, hf_class=kind_of(config).name)
    return text + note if tasks and note not in text else text


def _short_card(config: ModelConfig, vocab_size: int) -> str:
    hf_class = kind_of(config).name
    source = (
        "BERT (Devlin et al. 2019)"
        if config.architecture == "bert"
        else "ModernBERT (Warner et al. 2024)"
    )
    objectives = "masked language modelling and next sentence prediction"
    if config.tasks != DEFAULT_TASKS:
        objectives = "these tasks: " + ", ".join(config.tasks)
    pipeline = "fill-mask" if "mlm_head" in heads_of(config.tasks) else "feature-extraction"
    return f"""---
library_name: transformers
pipeline_tag: {pipeline}
---

{source}, pretrained with {objectives}:
{config.num_hidden_layers} layers, hidden size {config.hidden_size}, \
{config.num_attention_heads} heads, {vocab_size} tokens, \
sequences up to {config.max_position_embeddings} tokens, fp32 weights.

```python
from transformers import AutoTokenizer, {hf_class}

tokenizer = AutoTokenizer.from_pretrained(".")
model = {hf_class}.from_pretrained(".")
```
"""
