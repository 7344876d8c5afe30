"""Training: `python -m train.main --config=configs/quickstart.py --workdir=DIR`."""
