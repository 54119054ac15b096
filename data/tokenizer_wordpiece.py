"""Texts in, a WordPiece tokenizer folder out, as BERT has it: vocab.txt, tokenizer.json and two configs."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from data.encode_sentencepiece import is_han
from data.tokenizer_hf import MODEL_MAX_LENGTH, SPECIAL_TOKENS

CONTINUES = "##"  # begins a piece inside a word
CHARACTER_COVERAGE = 0.9995  # share of the text's characters that are in the vocabulary


def train_wordpiece(
    texts: Iterable[str], folder: Path, *, vocab_size: int, lowercase: bool
) -> None:
    """Train on `texts` (pieces by frequency, as Sennrich et al. 2016 merge them) and fill `folder`.

    Text is parted at spaces, punctuation and Han characters before. lowercase: takes accents off, too, as
    BERT's uncased vocabularies do. The same texts give the same bytes. ValueError when they do not support
    `vocab_size` pieces, or have more characters than that.
    """
    kept = list(texts)
    tokenizer = bert_tokenizer({}, lowercase)
    alphabet = _alphabet(kept, tokenizer)
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: the characters and special tokens of this text alone "
            f"need {smallest}. Raise vocab_size"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # The trainer numbers characters in an order that changes from run to run, and breaks ties by these
        # numbers; what is special to it, it numbers as it is given.
        special_tokens=[*SPECIAL_TOKENS, *alphabet],
        limit_alphabet=0,
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )
    tokenizer.train_from_iterator(kept, trainer)
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) < vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} is larger than this text supports: the largest possible is "
            f"{len(vocabulary)}. Lower vocab_size, or give more text"
        )
    save_wordpiece(vocabulary, folder, lowercase)


def _alphabet(texts: list[str], tokenizer: Tokenizer) -> list[str]:
    """The most frequent characters, each also as it goes on in a word; Han and punctuation never do."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))  # pyright: ignore[reportOptionalMemberAccess]
    ordered = sorted(((-n, c) for c, n in counts.items() if not c.isspace()))
    enough = CHARACTER_COVERAGE * -sum(n for n, _ in ordered)
    before = [0, *accumulate(-n for n, _ in ordered)]
    kept = [c for (_, c), seen in zip(ordered, before, strict=False) if seen < enough]
    return [form for c in sorted(kept) for form in ((c, CONTINUES + c) if _goes_on(c) else (c,))]


def _goes_on(character: str) -> bool:
    """Whether BERT's pre-tokenizer may leave this character inside a word."""
    ascii_symbol = character.isascii() and not character.isalnum()
    return not (ascii_symbol or unicodedata.category(character)[0] == "P" or is_han(character))


def bert_tokenizer(vocabulary: dict[str, int], lowercase: bool) -> Tokenizer:
    """BERT's pipeline (Devlin et al. 2019, and its code) around a vocabulary."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUES)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def save_wordpiece(vocabulary: dict[str, int], folder: Path, lowercase: bool) -> None:
    """Write what `AutoTokenizer.from_pretrained(folder)` needs; the special tokens have the ids 0 to 4."""
    tokenizer = bert_tokenizer(vocabulary, lowercase)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    ids = {token: vocabulary[token] for token in ("[CLS]", "[SEP]")}
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=list(ids.items()),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    named = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL_TOKENS, strict=True))
    special_tokens = {f"{name}_token": token for name, token in named.items()}
    config = {
        "tokenizer_class": "BertTokenizerFast",
        "do_lower_case": lowercase,
        "tokenize_chinese_chars": True,
        "strip_accents": None,
        "model_max_length": MODEL_MAX_LENGTH,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **special_tokens,
    }
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    for name, text in (
        ("vocab.txt", "".join(f"{piece}\n" for piece in pieces)),
        ("tokenizer_config.json", json.dumps(config, indent=1) + "\n"),
        ("special_tokens_map.json", json.dumps(special_tokens, indent=1) + "\n"),
    ):
        (folder / name).write_text(text, encoding="utf-8")
