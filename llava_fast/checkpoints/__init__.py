"""Checkpoints in Hugging Face's and the original LLaVA layout: names, configs, loading, saving."""
