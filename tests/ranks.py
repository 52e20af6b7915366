"""Ranks as threads of the test's own process."""

from concurrent.futures import ThreadPoolExecutor

from tpilite.collective import ThreadGroup
from tpilite.errors import PeerLost


def run_ranks(world_size, work):
    """`work(collective)` on each rank, a thread each; what every rank returned. A failing rank ends all."""
    group = ThreadGroup(world_size)

    def rank(collective):
        try:
            return work(collective)
        except BaseException:
            group.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(rank, collective) for collective in group.ranks]
    errors = [future.exception() for future in futures]
    for error in sorted(filter(None, errors), key=lambda error: isinstance(error, PeerLost)):
        raise error
    return [future.result() for future in futures]
