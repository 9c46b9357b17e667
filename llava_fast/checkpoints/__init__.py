"""Checkpoints in Hugging Face's and the original LLaVA layout: tensor names, configs, loading, saving."""
