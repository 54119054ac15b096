"""Batches in, losses out: BERT, its two heads, Hugging Face import and export, FLOP counts."""
