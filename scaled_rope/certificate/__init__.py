"""Which scaling a running model computes: hypotheses, their likelihood, and the certificate.

Holds what a server may run instead of what was asked for, the ways to ask it for log-probabilities, the noise that they
are judged by, and the layout of the result.
Knows nothing of training and tuning.
"""

from scaled_rope.versions import check_versions

check_versions("torch", "transformers")  # before an import that would fail in many lines
