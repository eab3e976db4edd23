"""`python -m scaled_rope` is the console script `scaled-rope`."""

import sys

from scaled_rope.cli import main

sys.exit(main())
