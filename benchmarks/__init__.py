"""Benchmarks of llava_fast beside transformers: `python benchmarks/run.py --help`. See README.md here."""
