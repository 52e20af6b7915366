"""tpilite: one Llama model run together by several weak machines, in NumPy."""

from tpilite.engine.sampling import SamplingParams
from tpilite.engine.session import Completion
from tpilite.errors import TpiliteError
from tpilite.llm import LLM
from tpilite.version import __version__

__all__ = ["LLM", "Completion", "SamplingParams", "TpiliteError", "__version__"]
