"""Flags of the evaluators and of `scaled-rope`, and the checks that need nothing but the flags.

Nothing here imports torch or transformers, which takes seconds: a mistyped flag or path is reported at once.

Knows nothing of torch.
"""
