"""The models that ship with the package, by name: small enough to carry, real enough to read.

Begin with `find_model`.
May import: nothing of the package.
Must never know: what is done with a model.
"""

import os.path
from os import PathLike
from pathlib import Path

SHIPPED = {"fable": Path(__file__).parent / "fable"}


def find_model(name: str | PathLike[str]) -> Path:
    """The folder of a model given by its path, or by the name of one that ships."""
    path = Path(os.path.expanduser(name))  # which leaves "~" as it is for a user without a home
    return SHIPPED.get(str(name), path) if not path.exists() else path
