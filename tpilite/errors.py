"""Every error that tpilite raises on purpose, by whose fault it is.

The command line turns each into one line on stderr and the exit code given here, and likewise what the system
refuses (`OSError`, `MemoryError`); anything else that escapes is a bug of ours and keeps its traceback.
"""


class TpiliteError(Exception):
    """What can go wrong outside our own code. Its text says what was expected, what was found, what to do."""

    exit_code = 2


class ConfigError(TpiliteError):
    """The user asked for something that does not exist, does not fit together or is not supported."""


class CheckpointError(TpiliteError):
    """A file of the model's own folder is missing, damaged or of a kind that is not supported."""


class SliceError(TpiliteError):
    """A slice file or its manifest is missing, damaged or made for another model or cluster."""


class ProtocolError(TpiliteError):
    """The peer sent what the protocol does not allow: it is no tpilite node or of another version."""

    exit_code = 3


class NotFinite(TpiliteError):
    """Rank `rank` computed what is no number: its part of the weights is damaged."""

    def __init__(self, rank: int, what: str) -> None:
        super().__init__(
            f"rank {rank} computed {what} that are not finite numbers: its part of the weights is damaged; "
            "make its slices anew (--split_bin, on another machine --force_download), or get the model again"
        )
        self.rank = rank


class PeerLost(TpiliteError):
    """The connection to a peer closed, or the peer was silent for too long."""

    exit_code = 3
