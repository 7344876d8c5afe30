"""From files or code-made tasks to batches of token ids."""
