"""Text in, batches out: documents, tokenizer, shards, lanes, rows, masking, batches."""
