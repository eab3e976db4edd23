"""The programs that serve models, one module each: words for a scaling, and what the program computes from them.

Holds the table of them, `registry.TARGETS`, and what several of them share.
Knows nothing of reports and command lines; `serving.export` compares a program's numbers with ours.
"""
