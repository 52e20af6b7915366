"""What a rank has spent: its seconds by what they went into, and the bytes that it has read."""

import resource
from dataclasses import dataclass
from pathlib import Path

from tpilite.weights.pager import PagerUsage


@dataclass(frozen=True)
class Usage:
    """Seconds spent and bytes read by this rank since its start, and what paging holds and has done."""

    compute_s: float = 0.0  # in the model, without its waits
    load_wait_s: float = 0.0
    network_wait_s: float = 0.0
    read_bytes: int = 0
    paging: PagerUsage | None = None

    def since(self, before: "Usage") -> "Usage":
        """What was spent after `before`, and what paging holds now."""
        return Usage(
            self.compute_s - before.compute_s,
            self.load_wait_s - before.load_wait_s,
            self.network_wait_s - before.network_wait_s,
            self.read_bytes - before.read_bytes,
            self.paging.since(before.paging) if self.paging and before.paging else self.paging,
        )


def disk_read_bytes() -> int:
    """The bytes that this process has made the disk read; counted in blocks where there is no /proc."""
    try:
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock * 512
