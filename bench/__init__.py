"""Measurements: `python -m bench` (attention against its peers); and real models: `python -m bench.minilm` (sentence
embeddings), `python -m bench.chat` (a language model), `python -m bench.reverse` (a small one that learns)."""
