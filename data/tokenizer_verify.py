"""A tokenizer and texts in, a report out: whether the exported tokenizer gives the ids that shards hold."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field

from data.sentences import sentence_ends
from data.vocab import Tokenizer

MAX_SHOWN = 5
ADVERSARIAL = (
    "",
    " \t\n",
    "[MASK] [CLS]text[SEP] [PAD][UNK] <0x41> <unk> </s>",
    "Two  spaces\tand\u3000wide ones \u00a0 end ",
    "\u200bzero\u200bwidth\u200b \ufeff \u00ad \x00nul\x00 \x85",
    "ﬁ ligature, ½, ① Ａ full width, ㎏ e\u0301 é ｶﾞ か\u3099 \u1112\u1161\u11ab",
    "literal ▁ mark ▁▁ twice ##ing ##",
    "(i) (ii) (iii) (iiii) ... .... ..... ------ …… —— ！！！！",
    "他说：“你好。”“再见！”然后走了。《书》没有。𠮷野家，龘。",
    "我用GPT-4,很好。It works!真的吗?3.14%",
    "🎉🎉 👩‍👩‍👧 ☺️ 🇨🇳 \ufffd",
    "Привет мир, Ελληνικά, العربية, हिन्दी, ไทย, 한국어, にほんご、カタカナ",
    "a" * 300 + " " + "很" * 300,
    "don't can't U.S.A. e-mail http://example.org/?q=1&r=2#x snake_case CamelCase",
)


@dataclass
class _Tally:
    num_texts: int = 0
    num_tokens: int = 0
    num_different: int = 0
    shown: list[str] = field(default_factory=list)


def verify_tokenizer(tokenizer: Tokenizer, texts: Iterable[str]) -> str:
    """Compare our ids with those of AutoTokenizer.from_pretrained(folder), text by text; returns what to say.

    texts: a sample of the corpus; adversarial strings are added. Literal special tokens are text to both
    (split_special_tokens). ValueError, with the first differences, when any ids differ.
    """
    from transformers import AutoTokenizer  # takes seconds, and nothing else here needs it

    exported = AutoTokenizer.from_pretrained(
        str(tokenizer.folder), local_files_only=True, trust_remote_code=False
    )
    tally = _Tally()
    for text in (*ADVERSARIAL, *texts):
        ours = tokenizer.encode(text, sentence_ends(text)).ids.tolist()
        theirs = exported(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        tally.num_texts += 1
        tally.num_tokens += len(ours)
        if ours != theirs:
            tally.num_different += 1
            if len(tally.shown) < MAX_SHOWN:
                tally.shown.append(_difference(text, exported, ours, theirs))
    if tally.num_different:
        raise ValueError(
            f"the tokenizer {tokenizer.folder} gives other ids than transformers does for "
            f"{tally.num_different:,} of {tally.num_texts:,} texts:\n  " + "\n  ".join(tally.shown)
        )
    return (
        f"tokenizer verified: {tally.num_tokens:,} ids of {tally.num_texts:,} texts are those that "
        "transformers gives"
    )


def _difference(text: str, exported: object, ours: list[int], theirs: list[int]) -> str:
    """The first place where two lists of ids differ, in pieces."""
    matcher = difflib.SequenceMatcher(None, ours[:2000], theirs[:2000], autojunk=False)
    a, b = next(
        ((a, b) for tag, a, _, b, _ in matcher.get_opcodes() if tag != "equal"), (2000, 2000)
    )
    pieces = exported.convert_ids_to_tokens  # pyright: ignore[reportAttributeAccessIssue]
    return (
        f"{text[:40]!r}: after {a} equal ids {pieces(ours[a : a + 5])} here, "
        f"{pieces(theirs[b : b + 5])} there"
    )
