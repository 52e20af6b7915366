"""`python -m tpilite` is `tpilite-node`."""

import sys

from tpilite.cli.main import main

sys.exit(main())
