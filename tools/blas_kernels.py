"""Runs tests under each kernel set of NumPy's OpenBLAS that this processor can run, and prints a table.

    .venv/bin/python tools/blas_kernels.py [PYTEST ARGUMENTS]

OpenBLAS chooses its kernels by the processor; OPENBLAS_CORETYPE makes it take others. That is for use by
hand: no test and no CI job sets it. A name that the wheel does not have, or that the processor cannot run,
gives another set: what was really taken stands in the table, and each set is tested once.
"""

import os
import subprocess
import sys

_NAMES = {
    "x86_64": "Prescott Nehalem Sandybridge Haswell Zen SkylakeX Cooperlake Sapphirerapids",
    "aarch64": "ARMV8 CORTEXA53 CORTEXA57 NEOVERSEN1 NEOVERSEV1 NEOVERSEN2 ARMV8SVE A64FX THUNDERX TSV110",
}
_TESTS = ["tests/linear", "tests/model", "tests/engine", "tests/weights/test_pager.py"]
_ASK = """
import ctypes, glob, os, numpy
folder = os.path.dirname(numpy.__file__)
(path,) = glob.glob(os.path.join(folder, "..", "numpy.libs", "*openblas*"))
name = ctypes.CDLL(path).scipy_openblas_get_corename64_
name.restype = ctypes.c_char_p
print(name().decode())
"""


def main() -> int:
    tests = sys.argv[1:] or _TESTS
    seen, failed = set(), False
    for name in _NAMES[os.uname().machine].split():
        environment = os.environ | {"OPENBLAS_CORETYPE": name}
        asked = subprocess.run(
            [sys.executable, "-c", _ASK], env=environment, capture_output=True, text=True, check=True
        )
        taken = asked.stdout.strip()
        if taken in seen:
            print(f"{name:16} takes {taken:16} as before", flush=True)
            continue
        seen.add(taken)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *tests]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = [line for line in found.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        failed |= found.returncode != 0
        print(
            f"{name:16} takes {taken:16} {'FAILED' if found.returncode else 'passed'}", *lines, sep="\n    "
        )
        sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
