"""Attention kernels, one folder per op. They know arrays and index ranges, nothing of models."""
