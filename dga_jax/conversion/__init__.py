"""Imports of Hugging Face folders and GGUF files, and exports to Hugging Face folders."""
