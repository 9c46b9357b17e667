"""Benchmarks of llava_fast against transformers: `python benchmarks/run.py --help`. See README.md here."""
