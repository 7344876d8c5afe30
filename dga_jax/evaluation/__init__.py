"""Evaluation on long contexts: tasks, scores, variants of a model, tables and plots."""
