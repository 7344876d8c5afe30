"""One file per experiment, with the keys that differ from the defaults.

The defaults are in the dataclasses of `train.config`. Every key can be changed on the command
line, as in --config.model.dga.group_size=32.
"""
