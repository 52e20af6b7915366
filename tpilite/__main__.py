"""`python -m tpilite` is `tpilite-node`: the BLAS is held to one thread, then the command line runs."""

import os
import sys

# The ranks' own threads share the work; a BLAS that starts its own beside them only gets in the way. It
# reads these when NumPy is imported, so they come before everything else.
for name in ("OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

try:
    from tpilite.cli.main import main
except ModuleNotFoundError as error:
    if error.name is None or error.name.startswith("tpilite"):
        raise
    sys.stderr.write(
        f"tpilite-node: the package {error.name} is missing: install tpilite with pip. All that it needs has "
        "wheels for 64-bit Linux with glibc and for macOS; elsewhere pip must build them.\n"
    )
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
