"""A Hugging Face folder of ours in, whether it is what was trained out: read back, and run by transformers.

python -m model.hf_parity FOLDER: the second part, in a process of its own; prints the report as JSON.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.hf import import_hf
from model.pretraining import ForPreTraining
from model.weights import build, load_weights

NUM_SEQUENCES, LENGTH = 2, 32
TOLERANCE = 1e-4  # of the largest logit, in fp32
REPORT_FILE = "parity.json"  # in the folder


def compare_weights(
    folder: Path, weights: Mapping[str, torch.Tensor], config: ModelConfig
) -> dict[str, Any]:
    """The folder read back holds the very same numbers. ValueError naming those that differ."""
    found, read, _ = import_hf(folder)
    wrong = [name for name in weights if not torch.equal(found[name], weights[name])]
    wrong += [
        f"config: {name}"
        for name in (
            "architecture",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "tasks",
        )
        if getattr(read, name) != getattr(config, name)
    ]
    if wrong:
        raise ValueError(f"{folder} does not hold what was trained: {', '.join(wrong[:5])} differ")
    return {"weights": "equal", "num_tensors": len(weights)}


def compare_logits_apart(folder: Path) -> dict[str, Any]:
    """`compare_logits` in another process, behind others: it loads transformers, and two models."""
    command = ["nice", "-n", "19", sys.executable, "-m", "model.hf_parity", str(folder)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise ValueError(f"{folder} is not the model that was trained: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def compare_logits(folder: Path) -> dict[str, Any]:
    """transformers and we compute the same of it. ValueError where they do not, or a weight is missing."""
    import transformers

    weights, config, vocab_size = import_hf(folder)
    ours = build(config, vocab_size).eval()
    load_weights(ours, weights)
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    theirs, info = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    missing = [name for name in info["missing_keys"] if not _is_spare_pooler(name, kind)]
    if unloaded := [*missing, *info["mismatched_keys"]]:
        raise ValueError(f"transformers' {kind} does not find {unloaded[:5]}")
    generator = torch.Generator().manual_seed(1)
    length = min(LENGTH, config.max_position_embeddings)
    ids = torch.randint(vocab_size, (NUM_SEQUENCES, length), generator=generator)
    positions = torch.arange(length).expand_as(ids)
    hidden = ours.encode(ids, torch.zeros_like(ids), positions, torch.zeros_like(ids))
    mask = torch.ones_like(ids)
    output = theirs.eval()(input_ids=ids, attention_mask=mask)
    found, wanted = _both(ours, hidden, kind, output)
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"transformers' {kind} computes other logits: {difference:.1e} of the largest"
        )
    return {"logits": "equal", "class": kind, "relative_difference": difference,
            "transformers": transformers.__version__}  # fmt: skip


def _is_spare_pooler(name: str, kind: str) -> bool:
    """A bare BertModel has a pooler even where the model has none; transformers then draws one."""
    return kind == "BertModel" and name.startswith("pooler.")


def _both(
    ours: ForPreTraining, hidden_BLD: torch.Tensor, kind: str, output: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the class computes, by us and by them: logits of its first head, or the hidden states."""
    if kind.endswith("Model"):
        return hidden_BLD, output.last_hidden_state
    if kind == "BertForNextSentencePrediction":
        return ours.nsp_logits(hidden_BLD[:, 0]), output.logits
    if kind == "ElectraForPreTraining":
        return ours.rtd_head(hidden_BLD), output.logits
    logits = output.prediction_logits if hasattr(output, "prediction_logits") else output.logits
    return ours.mlm_logits(hidden_BLD), logits


def main() -> None:
    try:
        print(json.dumps(compare_logits(Path(sys.argv[1]))))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
