"""Try every model type of the installed transformers that has RoPE: is it scaled for real, or refused by name?

python benchmarks/coverage.py                    # all types that have no row yet, a process for each
python benchmarks/coverage.py llama qwen3_vl     # these, measured anew
python benchmarks/coverage.py --table            # only the table in docs/models.md, from the rows
python benchmarks/coverage.py --check            # exit code 1 when the page has another table

For each type a small random model is built (`small_models.py`), patched with four scalings, unpatched, saved, read again
by transformers and by this package, and its logits are compared each time. The config that transformers makes by
default is inspected. Rows go to data/coverage_rows.jsonl; a run that was stopped goes on where it stood.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
