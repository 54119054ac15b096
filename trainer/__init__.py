"""A configuration and a prepared dataset in, a trained encoder and its checkpoints out."""
