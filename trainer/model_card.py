"""A run's configuration, data and state in, the README of its Hugging Face folder out."""

from typing import Any

from model.hf_kinds import kind_of
from trainer.config import RunConfig, to_yaml

NAMES = {"bert": "BERT", "modernbert": "ModernBERT"}
FILL_MASK = """
```python
from transformers import pipeline
print(pipeline("fill-mask", model=".")("The capital of France is [MASK]."))
```
"""


def model_card(
    config: RunConfig, manifest: dict[str, Any], step: int, num_tokens: int, num_parameters: int
) -> str:
    """Markdown. Says what was trained on what, and how to load it."""
    sources = "\n".join(
        f"| {name} | {splits['train']['num_documents']:,} | {splits['train']['num_tokens']:,} |"
        for name, splits in manifest["sources"].items()
    )
    hf_class = kind_of(config.model).name
    can_fill = hf_class.endswith(("PreTraining", "MaskedLM")) and "Electra" not in hf_class
    every = [config.data.objectives, *(phase.objectives or {} for phase in config.phases)]
    recipes = dict.fromkeys(name for objectives in every for name in objectives)
    return f"""---
library_name: transformers
tags: [{config.model.architecture}{", fill-mask" if can_fill else ""}]
---

# A {NAMES[config.model.architecture]} encoder, pretrained with Cloze

{num_parameters:,} parameters, {step:,} optimizer steps, {num_tokens:,} tokens seen.
Objectives: {", ".join(recipes)}.
{FILL_MASK if can_fill else ""}
`{hf_class}` takes every weight of `model.safetensors`; classes with fewer heads, such as `AutoModel`, leave
the rest.

## Data

| source | documents | tokens |
|---|---|---|
{sources}

Unigram entropy of the training text: {manifest["unigram_entropy_nats"]:.3f} nats; masked-token loss of a model
that sees no context: {manifest["context_free_loss_nats"]:.3f}.

## Configuration

```yaml
{to_yaml(config).rstrip()}
```
"""
