"""A run's configuration, data and state in, the README of its Hugging Face folder out."""

from typing import Any

from trainer.config import RunConfig, to_yaml

NAMES = {
    "bert": ("BERT", "BertForPreTraining"),
    "modernbert": ("ModernBERT", "ModernBertForMaskedLM"),
}


def model_card(
    config: RunConfig, manifest: dict[str, Any], step: int, num_tokens: int, num_parameters: int
) -> str:
    """Markdown. Says what was trained on what, and how to load it."""
    sources = "\n".join(
        f"| {name} | {splits['train']['num_documents']:,} | {splits['train']['num_tokens']:,} |"
        for name, splits in manifest["sources"].items()
    )
    name, hf_class = NAMES[config.model.architecture]
    return f"""---
library_name: transformers
tags: [{config.model.architecture}, fill-mask]
---

# A {name} encoder, pretrained with Cloze

{num_parameters:,} parameters, {step:,} optimizer steps, {num_tokens:,} tokens seen (masked language modelling
and next-sentence prediction, Devlin et al. 2019; masks drawn anew in each epoch).

```python
from transformers import pipeline
print(pipeline("fill-mask", model=".")("The capital of France is [MASK]."))
```

`{hf_class}` takes every weight of this folder; classes with fewer heads, such as `AutoModel`, leave the rest.

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
