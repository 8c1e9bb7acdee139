"""Checkpoints of a training run, and export to Hugging Face."""
