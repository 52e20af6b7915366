"""Programs that include a C source of the package below a main function of their own."""

import shutil
import subprocess
from pathlib import Path

import pytest

_LONG_S = 1200  # only a deadlock takes so long, on an emulated processor too


def built(tmp_path, source, main, compiler, *options):
    """The program of `main`, a file beside this one; skips where compiler or sanitizer are missing."""
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    program = tmp_path / "program"
    files = [f"-I{source.parent}", *options, Path(__file__).with_name(main), "-lm", "-o", program]
    done = subprocess.run([compiler, "-pthread", *files], capture_output=True, text=True, check=False)
    if done.returncode and "sanitize" in done.stderr:
        pytest.skip("this compiler has no such sanitizer")
    assert done.returncode == 0, done.stderr
    return program


def assert_prints(expected, *command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LONG_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == expected
