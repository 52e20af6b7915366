"""`python -m tpilite` is `tpilite-node`."""

import sys

from tpilite.cli import main

sys.exit(main())
