"""A vocabulary and a number of tokens in, peak memory and seconds of the masked language model's loss out.

    python -m bench.heads [--vocab-size 131072] [--tokens 65536] [--hidden 768]

Three ways to the same loss and gradients, each forward and backward in a process of its own:

    cloze           labelled rows, the logits of a part of them at a time
    labelled rows   logits of all labelled rows, then cross-entropy
    every row       logits of every row, then cross-entropy, as transformers' BertForPreTraining does

The latter two are measured on a fourth and a sixteenth of the rows, and scaled: few machines could hold them.
"""

import argparse
import multiprocessing
import platform
import resource
import time
from typing import NamedTuple

import torch

from model.heads import MlmHead, classify_masked, classify_rows, classify_rows_dense

MASKED_FRACTION = 0.15
WAYS = {  # and the part of the rows that it is measured on, one in so many
    "cloze": (classify_masked, 1),
    "labelled rows": (classify_rows, 4),
    "every row": (classify_rows_dense, 16),
}


class Measured(NamedTuple):
    gigabytes: float  # at the peak, over what the weights and hidden states take
    seconds: float
    loss: float  # nats per masked token


def measure(way: str, vocab_size: int, num_tokens: int, hidden_size: int) -> Measured:
    """Forward and backward of the head alone, in bf16."""
    loss_of, share = WAYS[way]
    num_rows = num_tokens // share
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(1)
    head = MlmHead(vocab_size, hidden_size, 1e-12)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    head.to(device, torch.bfloat16)
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(device, torch.bfloat16)
    hidden.requires_grad_()
    num_masked = int(num_rows * MASKED_FRACTION)
    index = torch.randperm(num_rows, generator=generator)[:num_masked].sort().values.to(device)
    labels = torch.randint(vocab_size, (num_masked,), generator=generator).to(device)
    before = memory_bytes(device)
    started = time.perf_counter()
    loss, _ = loss_of(head, hidden, index, labels)
    mean = loss / num_masked
    mean.backward()
    value = mean.item()  # waits for the device
    seconds = time.perf_counter() - started
    return Measured((memory_bytes(device) - before) * share / 1e9, seconds * share, value)


def memory_bytes(device: torch.device) -> int:
    """The most that was ever used by this process: of the device, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def heads_table(vocab_size: int, num_tokens: int, hidden_size: int) -> list[str]:
    """Markdown, a line for each way."""
    context = multiprocessing.get_context("spawn")
    lines = [
        "| way | peak memory, GB | seconds | loss | memory of cloze is less by |",
        "|---|---|---|---|---|",
    ]
    first = None
    for way in WAYS:
        with context.Pool(1) as pool:
            found = pool.apply(measure, (way, vocab_size, num_tokens, hidden_size))
        first = first or found
        scaled = " (scaled)" if WAYS[way][1] > 1 else ""
        lines.append(
            f"| {way}{scaled} | {found.gigabytes:.2f} | {found.seconds:.1f} | {found.loss:.4f} "
            f"| {found.gigabytes / max(first.gigabytes, 1e-3):.1f} x |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vocab-size", type=int, default=131072)
    parser.add_argument("--tokens", type=int, default=65536, help="of a micro-batch")
    parser.add_argument("--hidden", type=int, default=768)
    options = parser.parse_args()
    print(f"{platform.machine()}, torch {torch.__version__}")
    print(f"vocabulary {options.vocab_size:,}, {options.tokens:,} tokens, {MASKED_FRACTION:.0%} of them "
          f"masked, hidden {options.hidden}, bf16\n")  # fmt: skip
    for line in heads_table(options.vocab_size, options.tokens, options.hidden):
        print(line)


if __name__ == "__main__":
    main()
