"""A tokenizer folder in, an error out where text that spells a byte's name is a byte to its exported form."""

from pathlib import Path

import tokenizers

from data.tokenizer_hf import non_text_pieces, read_model
from data.vocab import MODEL_FILE, Tokenizer


def refuse_matched_literals(folder: Path, hint: str = "") -> None:
    """ValueError when tokenizer.json beside a sentencepiece model makes one byte piece of a literal "<0x41>".

    So did those that Cloze wrote in its first versions, where a vocabulary lacks "<". Takes less than a second.
    """
    model, exported = folder / MODEL_FILE, folder / "tokenizer.json"
    if not (model.is_file() and exported.is_file()):
        return
    tokenizer = Tokenizer.load(folder)
    theirs = tokenizers.Tokenizer.from_file(str(exported))
    theirs.encode_special_tokens = True
    pieces = non_text_pieces(read_model(model.read_bytes()))
    encoded = tokenizer.encode_batch(pieces, [[len(piece)] for piece in pieces])
    for piece, ours in zip(pieces, encoded, strict=True):
        encoding = theirs.encode(piece, add_special_tokens=False)
        if encoding.ids != ours.ids.tolist():
            raise ValueError(
                f"{exported} does not give the ids of {MODEL_FILE} beside it: the literal text {piece!r} "
                f"becomes {encoding.tokens} here, {len(ours.ids)} ids there{hint}"
            )
