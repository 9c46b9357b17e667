"""Scoring of free-form answers by a language model at an OpenAI-compatible endpoint: `llava-fast judge`."""
