"""Sound as tokens: μ-law samples, audio files, spectrograms, continuations."""
