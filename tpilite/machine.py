"""What this machine has: memory, cores, and the BLAS under NumPy; and what this process uses of it.

A process is bounded by the machine's free memory and by the limits of the control groups that it is in,
of version 1 or 2, at any level of their tree: the tightest one counts.

The BLAS is held to one thread: the threads that share the work are `linear`'s own. A BLAS reads its thread
count from the environment when it is loaded, which `__main__` sees to. In a program that has imported NumPy
already, the loaded OpenBLAS is asked by its own function instead. Accelerate (macOS) cannot be asked then:
its function, from macOS 15 on, holds for the calling thread alone.
"""

import ctypes
import logging
import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from tpilite.errors import ConfigError

logger = logging.getLogger(__name__)

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(|[kmgt]i?)b", re.IGNORECASE | re.ASCII)

# malloc.h's names. Arrays above the largest that glibc allows here are the kernel's at once.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BYTES, _KEPT_BYTES = 32 << 20, 64 << 20

# With the name changes of NumPy's own wheels, and as distributions build it.
_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)

_ROOT = Path("/")

# The limit and the usage of a control group, by the version of its tree.
_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    2: ("memory.max", "memory.current"),
}

# Left to others, and to the kernel's own memory for this process, which its control group counts.
_MARGIN_BYTES = 64 << 20


def parse_size(text: str) -> int:
    """The bytes that `700MB` (decimal), `1.5GiB` (binary) or `123456789B` say. Raises `ConfigError`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a size; expected a number and a unit, such as 700MB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_size(n_bytes: float, *, fine: bool = False) -> str:
    """A size for people, in decimal megabytes (gigabytes from ten thousand of them on).

    `fine` gives hundredths, of gigabytes from a tenth of one on.
    """
    if fine:
        return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e10 else f"{n_bytes / 1e6:.0f} MB"


def rss_bytes() -> int:
    """The memory that this process has now, its mapped files' pages included.

    Where there is no /proc (macOS), the most that it has had.
    """
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_rss_bytes()


def peak_rss_bytes() -> int:
    """The most memory that this process has had, its mapped files' pages included."""
    kib = _fields(Path("/proc/self/status")).get("VmHWM:")
    if kib is not None:
        return kib * 1024
    # Not the first choice: on Linux it begins with the memory of the process that started this one.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Lets this process keep some of the memory that its arrays give back, until `return_freed_memory`.

    Else glibc would hand it to the kernel after every layer of a prompt and take it anew for the next, page
    by page: a twentieth of the time. Other C libraries are left as they are.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed_memory() -> None:
    """Gives the kernel what `keep_freed_memory` has kept."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    """The C library where it is glibc."""
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def spare_bytes(root: Path = _ROOT) -> int | None:
    """What this process could take in addition without another's or its own control group's harm.

    None where the system tells nothing of it (macOS). Other files' cached pages count as free. `root`
    is where /proc and /sys are.
    """
    found = list(_cgroup_spares(root))
    free = _fields(root / "proc/meminfo").get("MemAvailable:")
    if free is not None:
        found.append(free * 1024)
    return max(0, min(found)) if found else None


def auto_budget_bytes(root: Path = _ROOT) -> int:
    """The budget of a process that takes what the machine can spare now, and leaves others a margin."""
    spare = spare_bytes(root)
    if spare is None:
        return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize() // 2
    return rss_bytes() + spare - min(spare, max(_MARGIN_BYTES, spare // 10))


def cgroup_limit_bytes(root: Path = _ROOT) -> int | None:
    """The most memory that the control groups of this process allow; None where they do not bound it."""
    return min((limit for _, limit, _ in _cgroup_limits(root)), default=None)


def _cgroup_limits(root: Path) -> Iterator[tuple[Path, int, int]]:
    """The folder, the limit and the usage of each group with a limit that this process is in."""
    for folder, version in _cgroup_folders("memory", root):
        limit_name, usage_name = _MEMORY_FILES[version]
        try:
            limit, usage = (int((folder / name).read_text()) for name in (limit_name, usage_name))
        except (OSError, ValueError):
            continue  # "max", or the top of a tree, which has no limit
        yield folder, limit, usage


def _cgroup_spares(root: Path) -> Iterator[int]:
    """The room below each limit of each group that this process is in."""
    for folder, limit, usage in _cgroup_limits(root):
        stat = _fields(folder / "memory.stat")
        # Version 1 counts what is below a group under names of its own.
        cached = sum(
            stat.get(f"total_{name}", stat.get(name, 0)) for name in ("active_file", "inactive_file")
        )
        yield limit - usage + cached


def _cgroup_folders(controller: str, root: Path) -> Iterator[tuple[Path, int]]:
    """Every control group of this process, up to the top, and its version."""
    paths: dict[str, PurePosixPath] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = PurePosixPath(group)
    for line in _lines(root / "proc/self/mountinfo"):
        # id parent major:minor root mount-point options [tags...] - type source super-options
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        top, mount_point = left.split(" ")[3:5]
        if kind not in paths or (kind == "cgroup" and controller not in options.split(",")):
            continue
        # A container may see a part of the tree mounted, and its path counted from the whole tree's top.
        path = paths[kind]
        inside = path.relative_to(top) if path.is_relative_to(top) else path.relative_to("/")
        for folder in (inside, *inside.parents):
            yield root / mount_point.lstrip("/") / folder, 1 if kind == "cgroup" else 2


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file of `name number` lines; other lines are left out."""
    rows = [line.split() for line in _lines(path)]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def usable_cores(root: Path = _ROOT) -> int:
    """The threads that can compute at once: as many as physical cores, and no more than the quotas allow.

    Of a quota of one and a half processors one is used: threads that are throttled make all others wait.
    """
    return max(1, min([physical_cores(), *(int(quota) for quota in _cpu_quotas(root))]))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """The processors that each control group of this process may use, where it has a quota."""
    for folder, version in _cgroup_folders("cpu", root):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = " ".join(line for name in names for line in _lines(folder / name)).split()
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
            yield int(words[0]) / int(words[1])  # "max" and -1 are none


def physical_cores() -> int:
    """The cores that this process may run on, hyper-threads of one core counted once."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, os.cpu_count() or 1)
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def limit_blas_threads() -> None:
    """Holds every OpenBLAS that this process has loaded to one thread, from now on and for everybody."""
    found = False
    for path in sorted(_loaded_libraries()):
        library = ctypes.CDLL(path)
        for name in _SETTERS:
            if hasattr(library, name):
                getattr(library, name)(ctypes.c_int(1))
                found = True
    if not found:
        logger.debug("no OpenBLAS found to hold to one thread; its environment variables still count")


def _loaded_libraries() -> set[str]:
    """The files of the OpenBLAS libraries that are loaded, or that NumPy's wheel brings along."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.split(maxsplit=5)[5] for line in lines if "openblas" in line and "/" in line}
    except OSError:
        folder = Path(np.__file__).parent
        return {str(p) for p in (folder / ".dylibs").glob("*openblas*")}
