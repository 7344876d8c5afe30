"""Dynamic Group Attention on one device: scores, selection, merged groups, attention."""
