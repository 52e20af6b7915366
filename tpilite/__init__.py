"""tpilite: one Llama model run together by several weak machines, in NumPy."""

from importlib import import_module
from typing import TYPE_CHECKING

from tpilite.version import __version__

__all__ = ["LLM", "Completion", "SamplingParams", "TpiliteError", "__version__"]

# Imported when they are first asked for: `python -m tpilite` imports this file before its own, which must
# still be able to say how many threads a BLAS starts, before NumPy is there.
if TYPE_CHECKING:
    from tpilite.engine.sampling import SamplingParams
    from tpilite.engine.session import Completion
    from tpilite.errors import TpiliteError
    from tpilite.llm import LLM
else:
    _MODULES = {
        "LLM": "tpilite.llm",
        "Completion": "tpilite.engine.session",
        "SamplingParams": "tpilite.engine.sampling",
        "TpiliteError": "tpilite.errors",
    }

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)
