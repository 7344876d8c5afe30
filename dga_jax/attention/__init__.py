"""Dynamic Group Attention on one device: scores → selection → layout → visibility → attention."""
