"""What makes the sums between the ranks of a cluster: compiled code, where that is used."""

from contextlib import suppress

from tpilite.engine.compiled import exchange_library
from tpilite.net.sums import NewSum, new_sum

with suppress(ImportError):  # then there is no library either
    from tpilite.native.exchange import sums_by


def new_sums() -> NewSum:
    """What makes the sums of a group."""
    library = exchange_library()
    return new_sum if library is None else sums_by(library)
