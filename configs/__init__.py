"""One file per experiment; base.py holds the defaults."""
