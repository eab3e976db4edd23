"""Tables, figures and pages from result rows, and the numbers that the paper published beside them.

Knows nothing of how rows are measured; no model is ever read here.
"""
