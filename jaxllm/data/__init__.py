"""Text to batches: tokenizer, sources, token store, packing, mixture, loader."""
