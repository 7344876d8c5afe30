"""Checkpoints of other programs, Hugging Face's folders and GGUF files, to ours and back."""
