"""What `python -m dga_jax.evaluate` is made of: tasks, scores, variants of a model, pictures."""
