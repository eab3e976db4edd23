"""Attention implementations that this package adds to those of transformers."""
