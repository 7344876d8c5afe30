"""Sound as tokens: μ-law samples, audio files, continuations, measures and plots."""
