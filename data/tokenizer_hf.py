"""A sentencepiece model in, a Hugging Face tokenizer folder out: tokenizer.json and its two configs.

None of transformers' own sentencepiece classes gives the ids of the model it loads, so the pipeline is
built here from the parts of `tokenizers`. Its ids equal sentencepiece's.
"""

import json
from pathlib import Path
from typing import Any, Literal

from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # our ids 0..4, in this order
NEVER = -1e4  # score of pieces that text must not match
MODEL_MAX_LENGTH = 512
INPUT_NAMES = ["input_ids", "token_type_ids", "attention_mask"]
ModelProto = Any  # sentencepiece_model_pb2 has no type information


def export_tokenizer(model: bytes, folder: Path) -> None:
    """Write what `AutoTokenizer.from_pretrained(folder)` needs, so that pairs get token_type_ids."""
    tokenizer = build_tokenizer(read_model(model))
    tokenizer.save(str(folder / "tokenizer.json"))
    named = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL_TOKENS, strict=True))
    special_tokens = {f"{name}_token": token for name, token in named.items()}
    config = {
        # The name that transformers 4 and 5 both load; 5 would write TokenizersBackend.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MODEL_MAX_LENGTH,
        "model_input_names": INPUT_NAMES,
        "clean_up_tokenization_spaces": False,
        **special_tokens,
    }
    for name, value in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special_tokens),
    ):
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def forget_model(path: Path) -> None:
    """Take a model's longest row and inputs back out of its tokenizer_config.json; ids depend on neither.

    An exported model's tokenizer is then, byte by byte, the one that the dataset it was trained on has.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= {"model_max_length": MODEL_MAX_LENGTH, "model_input_names": INPUT_NAMES}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def read_model(model: bytes) -> ModelProto:
    """The protocol buffer that a sentencepiece model file is."""
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(model)
    return proto


def model_kind(proto: ModelProto) -> Literal["unigram", "bpe"]:
    return "unigram" if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM else "bpe"


def build_tokenizer(proto: ModelProto) -> Tokenizer:
    """The same pipeline as the sentencepiece model: normalise, mark word starts, segment."""
    tokenizer = Tokenizer(_unigram(proto) if model_kind(proto) == "unigram" else _bpe(proto))
    tokenizer.normalizer = normalizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Replace(Regex(r" \z"), ""),  # Strip would take U+0085 too
        ]
    )
    tokenizer.pre_tokenizer = _pre_tokenizer(proto)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    ids = {token: SPECIAL_TOKENS.index(token) for token in ("[CLS]", "[SEP]")}
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=list(ids.items()),
    )
    return tokenizer


def _pre_tokenizer(proto: ModelProto) -> pre_tokenizers.PreTokenizer:
    """Words between spaces; what `_unigram` must not match is taken apart if it could be.

    "first": text that follows a special token inside a text, as in 我[MASK]你, is not a new word.
    """
    words = pre_tokenizers.Metaspace(prepend_scheme="first")
    lacking = missing_characters(proto)
    if model_kind(proto) == "bpe" or not lacking:
        return words
    code_points = "".join(rf"\x{{{ord(character):x}}}" for character in lacking)
    apart = pre_tokenizers.Split(Regex(f"[{code_points}]"), "isolated")
    return pre_tokenizers.Sequence([words, apart])


def missing_characters(proto: ModelProto) -> list[str]:
    """Characters of "<0x41>", "[MASK]" and other pieces that are no text which no piece of text holds.

    Segmenting never crosses one of them, so that a cut on both sides changes no id.
    """
    normal = proto.SentencePiece.NORMAL
    known = {character for p in proto.pieces if p.type == normal for character in p.piece}
    return sorted(set("".join(non_text_pieces(proto))) - known)


def non_text_pieces(proto: ModelProto) -> list[str]:
    """Special tokens and bytes, by their names: what no text may become."""
    return [p.piece for p in proto.pieces if p.type != proto.SentencePiece.NORMAL]


def _unigram(proto: ModelProto) -> models.Unigram:
    """Pieces that are no text keep their ids but lose their scores.

    HF would match a literal "<0x41>" in a text with them, or "[MASK]" where special tokens are left as
    text; sentencepiece never does. HF's unknown character is worth less even than NEVER: so where one of
    theirs is unknown, `_pre_tokenizer` takes them apart. (Byte fallback needs the pieces; BPE has no merges
    that lead to them.)
    """
    normal = proto.SentencePiece.NORMAL
    pieces = [(p.piece, p.score if p.type == normal else NEVER) for p in proto.pieces]
    return models.Unigram(pieces, unk_id=SPECIAL_TOKENS.index("[UNK]"), byte_fallback=True)


def _bpe(proto: ModelProto) -> models.BPE:
    """sentencepiece joins the pair whose union has the best score; so every split of a piece is a merge."""
    vocab = {p.piece: index for index, p in enumerate(proto.pieces)}
    normal = {p.piece: p.score for p in proto.pieces if p.type == proto.SentencePiece.NORMAL}
    merges = [
        (-score, vocab[left], vocab[right], left, right)
        for piece, score in normal.items()
        for left, right in ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        if left in normal and right in normal
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    return models.BPE(vocab, pairs, unk_token="[UNK]", fuse_unk=True, byte_fallback=True)
