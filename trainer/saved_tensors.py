"""The tensor files of a checkpoint in, any part of any tensor out. Needs no engine.

train_state-00000-of-00002.safetensors
    exp_avg/layers.0.output.bias            a whole tensor, in its shape
    master/embeddings.word_embeddings.weight@4096
                                            a run of the flattened tensor that begins at element 4096
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open


class Piece(NamedTuple):
    start: int
    stop: int
    file: Any  # of safetensors, open
    key: str


def key_of(part: str, name: str, start: int, is_whole: bool) -> str:
    return f"{part}/{name}" if is_whole else f"{part}/{name}@{start}"


class SavedTensors:
    """All pieces of all tensors, by 'part/name'. ValueError where they overlap or leave a gap."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        for path in sorted(folder.glob("train_state-*.safetensors")):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
            for key in file.keys():  # noqa: SIM118 - safe_open is no dict
                name, _, start = key.partition("@")
                first = int(start or 0)
                length = prod(file.get_slice(key).get_shape())
                self._pieces[name].append(Piece(first, first + length, file, key))
        for name, pieces in self._pieces.items():
            pieces.sort()
            ends = [0, *(piece.stop for piece in pieces)]
            if any(piece.start != end for piece, end in zip(pieces, ends, strict=False)):
                spans = ", ".join(f"{piece.start}-{piece.stop}" for piece in pieces)
                raise ValueError(f"{folder} holds {name} in pieces that do not fit: {spans}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def sizes(self) -> dict[str, int]:
        """Elements of each tensor, by 'part/name'."""
        return {name: pieces[-1].stop for name, pieces in self._pieces.items()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """fp32 [stop - start] of the flattened tensor. name: 'part/name'."""
        found = [
            _cut(piece, max(start, piece.start), min(stop, piece.stop))
            for piece in self._pieces[name]
            if piece.start < stop and piece.stop > start
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def problems(self, expected: Mapping[str, int]) -> list[str]:
        """What differs from the tensors that a model has. expected: elements by 'part/name'."""
        sizes = self.sizes()
        problems = [f"it lacks {name}" for name in sorted(expected.keys() - sizes.keys())]
        problems += [
            f"it holds {name}, which the model has not" for name in sorted(sizes.keys() - expected)
        ]
        problems += [
            f"{name} has {sizes[name]} elements, the model's {expected[name]}"
            for name in sorted(expected.keys() & sizes.keys())
            if sizes[name] != expected[name]
        ]
        return problems


def _cut(piece: Piece, start: int, stop: int) -> torch.Tensor:
    first, last = start - piece.start, stop - piece.start
    if "@" in piece.key:
        return piece.file.get_slice(piece.key)[first:last]
    return piece.file.get_tensor(piece.key).flatten()[first:last]


class SavedPart(Mapping[str, torch.Tensor]):
    """One part ("master") of all parameters, by name: each whole tensor is read when it is asked for."""

    def __init__(self, saved: SavedTensors, part: str, shapes: Mapping[str, torch.Size]) -> None:
        self._saved, self._part, self._shapes = saved, part, shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        return self._saved.read(f"{self._part}/{name}", 0, shape.numel()).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
