"""Where texts, tokenized sets, benchmarks and small models come from, and how texts become rows of tokens on disk.

Knows nothing of scalings, nor of what is trained or measured on the texts.
"""
