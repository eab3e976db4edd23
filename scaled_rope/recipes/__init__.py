"""Training recipes: their schema, their YAML files, their runs on disk, and a small command line for shell scripts.

Knows nothing of torch and models.
"""
