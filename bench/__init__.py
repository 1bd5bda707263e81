"""Measurements: `python -m bench` (attention against its peers), `python -m bench.minilm` (a real model)."""
