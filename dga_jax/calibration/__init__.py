"""Calibration: chooses the setting of each KV head of a given model under a budget."""
