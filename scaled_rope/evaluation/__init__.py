"""Evaluations of models, from prompts to result rows: perplexity, passkeys, QuALITY, benchmarks.

Knows nothing of the tables and figures that rows go into, nor of training.
"""
