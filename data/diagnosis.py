"""Measurements of a dataset in, verdicts with likely cause and remedy out: the thresholds of `cloze doctor`.

WARNING: the run will work, and be worse or slower than it could be. PROBLEM: it would fail, or learn
next to nothing of what it is meant to. Each threshold says why it is where it is. None of them finds
fault with English and Chinese Wikipedia, novels, speeches, laws, poetry, classics and technical
documentation, prepared with a tokenizer that was trained on them (vocabulary 16,000).
"""

import math
from typing import Literal, NamedTuple

import numpy as np

from data.entropy import unigram_entropy
from data.inspection import SHORT_TOKENS, RowSurvey, SourceSurvey
from data.near_copies import NearCopies

Verdict = Literal["OK", "WARNING", "PROBLEM"]


class Finding(NamedTuple):
    """One line of the doctor's table; `advice` (cause, then what to do) is empty when all is well."""

    check: str
    of: str  # source, phase, or the whole dataset
    found: str
    verdict: Verdict = "OK"
    advice: str = ""


class Limits(NamedTuple):
    """From where on a share is a WARNING, and a PROBLEM; above 1 where it never is one."""

    warning: float
    problem: float

    def verdict(self, share: float) -> Verdict:
        if share >= self.problem:
            return "PROBLEM"
        return "WARNING" if share >= self.warning else "OK"


# Of the tokens. A document of one sentence has no sentence end for A and B to meet at, so its pairs are
# cut inside sentences. In running text it is rare (below 1 %); titles and verses are made of it.
SINGLE = Limits(0.2, 0.8)
# Of the tokens of one-sentence documents against their number: running text has some 20 to 50 tokens in
# a sentence, and a row of the usual 128 slots is full at 125.
LONG_SENTENCE = 125
# Of the tokens. Text in a tokenizer's own language has at most some 0.1 % of [UNK], and Chinese under a
# shared vocabulary of 4,000 some 3 % of bytes. Text in another language falls back nearly everywhere.
UNKNOWN = Limits(0.005, 0.05)
BYTES = Limits(0.1, 0.4)
# Of the documents: below SHORT_TOKENS, A and B are a few words each.
SHORT = Limits(0.3, 0.8)
# Of the tokens in exact copies. Lee et al. 2022 found 0.4 % (Wikipedia) to 14 % (news) of near-copies in
# published corpora, and gains from taking them out.
COPIES = Limits(0.05, 0.3)
# Of the documents that are nearly the same as another: template pages, mirrors, versions of one text.
NEAR_COPIES = Limits(0.15, 0.5)
# Of the slots left empty. Packed rows leave 1 %; without packing, rows end where documents end.
EMPTY_PACKED = Limits(0.05, 0.3)
EMPTY_UNPACKED = Limits(0.35, 0.7)
# How far the share of random B's is from a half. At 0.15, guessing is right in 65 %, not 50 %.
UNBALANCED = Limits(0.15, 0.4)
UNLABELLED_PAIRS = Limits(
    0.05, 0.5
)  # of the pairs: single tokens that were left; below 0.1 % in running text
MIN_PAIRS = 100  # fewer labelled ones tell nothing of a share
# Of one token. The commonest in running text ("the", a comma, 的) has 3 to 6 %, in tiny vocabularies 10 %.
COMMONEST = Limits(0.2, 0.5)
# Entropy of the tokens over the logarithm of how many kinds occur: 0.7 to 0.9 in text of any language.
LEAST_EVENNESS = Limits(0.5, 0.7)  # of what is missing to 1
MIN_TOKENS = 10_000  # fewer tell nothing of shares


def finding(check: str, of: str, found: str, verdict: Verdict, advice: str) -> Finding:
    """A Finding that keeps its advice for when it is needed."""
    return Finding(check, of, found, verdict, advice if verdict != "OK" else "")


def judge_source(survey: SourceSurvey, unknown_id: int, byte_ids: np.ndarray) -> list[Finding]:
    """Sentences, tokenizer, copies, length of documents and variety of one source's sample."""
    damage = [
        Finding(
            "block hashes", survey.name, f"{len(survey.damaged)} of {survey.num_read} damaged",
            "PROBLEM", f"{survey.damaged[0]}",
        )
    ] if survey.damaged else []  # fmt: skip
    if survey.num_tokens < MIN_TOKENS:
        few = f"{survey.num_tokens:,} tokens: too few to judge"
        return [*damage, Finding("sample", survey.name, few)]
    return [
        *damage,
        _sentences(survey),
        _unknown(survey, unknown_id),
        _bytes(survey, byte_ids),
        _copies(survey),
        _short(survey),
        _evenness(survey),
        _commonest(survey),
    ]


def _sentences(survey: SourceSurvey) -> Finding:
    share = survey.single_tokens / survey.num_tokens
    mean = survey.num_tokens / survey.num_sentences
    found = (
        f"{share:.1%} of the tokens in documents of one sentence; {mean:.0f} tokens a sentence, "
        f"{survey.num_sentences / survey.num_documents:.1f} sentences a document"
    )
    verdict = SINGLE.verdict(share)
    if mean > LONG_SENTENCE and verdict == "OK":
        verdict = "WARNING"
    length = survey.single_tokens / max(1, survey.num_single)
    if mean > LONG_SENTENCE or length > LONG_SENTENCE:
        cause = (
            "The sentences are longer than a row: the text has no sentence ends that the splitter knows (a "
            "language with other marks, or punctuation that was taken out). Next-sentence pairs are cut "
            "anywhere. Keep the punctuation, or put each sentence on a line of its own, and prepare again."
        )
    else:
        cause = (
            "Documents of one short sentence, such as titles, messages or verses, or a file of sentences "
            "taken for a file of documents: next-sentence pairs are halves of sentences. Join what belongs "
            "together into one document (--txt-documents blank_line for text files), or give the source "
            "a small weight."
        )
    return finding("sentences", survey.name, found, verdict, cause)


def _unknown(survey: SourceSurvey, unknown_id: int) -> Finding:
    share = survey.share_of(np.array([unknown_id]))
    verdict = UNKNOWN.verdict(share)
    advice = (
        "The tokenizer does not know this text's characters or words: it was made for another language or "
        "script. The model learns to predict [UNK]. Train a tokenizer on this text (leave --tokenizer out), "
        "or take one that was made for it."
    )
    return finding("unknown tokens", survey.name, f"{share:.2%} are [UNK]", verdict, advice)


def _bytes(survey: SourceSurvey, byte_ids: np.ndarray) -> Finding:
    if not len(byte_ids):
        return Finding("byte tokens", survey.name, "the tokenizer has none")
    share = survey.share_of(byte_ids)
    verdict = BYTES.verdict(share)
    advice = (
        "Characters are spelt out in bytes: the tokenizer was made for another language, or its sample held "
        "too little of this source. Rows hold less text, and masked tokens are parts of characters. Train "
        "the tokenizer on this text too, or with a larger --vocab-size."
    )
    return finding("byte tokens", survey.name, f"{share:.2%} are bytes", verdict, advice)


def _copies(survey: SourceSurvey) -> Finding:
    """In a sample, a copy is seen only when both lie in it: what is found is less than there is."""
    share = survey.copied_tokens / survey.num_tokens
    read = survey.num_read / survey.num_blocks
    expected = min(1.0, share / read)
    found = f"{share:.1%} of the tokens in {survey.num_copies:,} exact copies"
    if not survey.is_whole:
        found += f" within a sample of {read:.1%}; about {expected:.1%} of all"
    verdict = COPIES.verdict(expected)
    advice = (
        "The same documents are there again and again: the model learns them by heart, and evaluation says "
        "too little of it. Was a file given twice, or do two sources overlap? Take the copies out and "
        "prepare again."
    )
    return finding("copies", survey.name, found, verdict, advice)


def judge_near_copies(near: NearCopies, num_tokens: int) -> Finding:
    """Over all sources. num_tokens: of the training text, to tell how much of it was compared."""
    share = near.num_copies / max(1, near.num_documents)
    read = near.num_tokens / max(1, num_tokens)
    expected = min(1.0, share / max(read, 1e-9))
    found = f"{share:.1%} of {near.num_documents:,} documents"
    if read < 1:
        found += f" in {read:.1%} of the text; about {expected:.1%} of all"
    pair = " and ".join(f"{own:016x}" for own in near.example or ())
    advice = (
        f"Many documents differ from another in a few words only, such as those with ids {pair}: templates, "
        "mirrors, or versions of one text. Take them out (cloze corpus), and prepare again."
    )
    return finding("near-copies", "all", found, NEAR_COPIES.verdict(expected), advice)


def _short(survey: SourceSurvey) -> Finding:
    share = survey.num_short / survey.num_documents
    verdict = SHORT.verdict(share)
    advice = (
        f"Most of these documents are a few words: below {SHORT_TOKENS} tokens neither masking nor "
        "next-sentence prediction has context. Were lines taken for documents? (--txt-documents, --text-field)"
    )
    found = f"{share:.1%} of {survey.num_documents:,} documents below {SHORT_TOKENS} tokens"
    return finding("short documents", survey.name, found, verdict, advice)


def _evenness(survey: SourceSurvey) -> Finding:
    entropy = unigram_entropy(survey.counts)
    kinds = int((survey.counts > 0).sum())
    missing = 1 - entropy / math.log(max(2, kinds))
    verdict = LEAST_EVENNESS.verdict(missing)
    found = f"unigram entropy {entropy:.2f} nats over {kinds:,} kinds of tokens: evenness {1 - missing:.2f}"
    advice = (
        "A few tokens make up nearly all of the text: repeated lines, tables, padding or a broken conversion. "
        "Look at it (the decoded rows of `cloze blame`, or the input itself) and take out what repeats."
    )
    return finding("variety", survey.name, found, verdict, advice)


def _commonest(survey: SourceSurvey) -> Finding:
    token = int(survey.counts.argmax())
    share = float(survey.counts[token]) / survey.num_tokens
    verdict = COMMONEST.verdict(share)
    advice = (
        f"One token (id {token}) is everywhere: rulers of dashes, padding, white space, or text that the "
        "tokenizer cannot spell. Predicting it is most of the loss. Clean the text of it."
    )
    found = f"id {token} is {share:.1%} of the tokens"
    return finding("commonest token", survey.name, found, verdict, advice)


def judge_rows(survey: RowSurvey, of: str, packing: bool) -> list[Finding]:
    """How full rows are, and whether half of the pairs have a random B."""
    limits = EMPTY_PACKED if packing else EMPTY_UNPACKED
    verdict = limits.verdict(1 - survey.fill)
    rows_per_block = survey.num_rows / max(1, survey.num_blocks)
    if packing:
        cause = (
            f"A block gives only {rows_per_block:.0f} rows, and its last ones stay open: prepare with larger "
            "--block-tokens, or take shorter rows."
        )
    else:
        cause = "Documents are shorter than a row: set data.packing=true, or take shorter rows."
    found = f"{survey.fill:.1%} of the slots, {rows_per_block:,.0f} rows a block of {survey.sequence_length}"
    fill = finding("fill of rows", of, found, verdict, cause)
    return [fill, _labels(survey, of)]


def _labels(survey: RowSurvey, of: str) -> Finding:
    unlabelled = survey.num_unlabelled / max(1, survey.num_pairs)
    found = f"{survey.random_share:.1%} of the pairs random, {unlabelled:.1%} without a B"
    if survey.num_pairs < MIN_PAIRS:
        return Finding("next-sentence labels", of, f"{survey.num_pairs} pairs: too few to judge")
    verdict = UNBALANCED.verdict(abs(survey.random_share - 0.5))
    if verdict != "PROBLEM" and unlabelled >= UNLABELLED_PAIRS.warning:
        verdict = UNLABELLED_PAIRS.verdict(unlabelled)
    advice = (
        "A random B comes from another document of the same block: these blocks hold too few documents, or "
        "one that is more than half of them. Guessing the commoner label is then right too often. Prepare "
        "with larger --block-tokens, or cut very long documents (books into chapters)."
    )
    return finding("next-sentence labels", of, found, verdict, advice)
