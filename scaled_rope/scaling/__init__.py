"""Scalings as data: the record, its text and config forms, the registry of methods and their formulas.

A formula is a pure function from the record to frequencies, in `frequencies.py`, the only module here with torch.
Knows nothing of models, modules and caches.
"""
