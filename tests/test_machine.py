"""What the machine can spare, against trees of /proc and /sys as kernels write them; sizes."""

import contextlib
import ctypes
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpilite import machine
from tpilite.errors import ConfigError
from tpilite.machine import (
    auto_budget_bytes,
    cgroup_limit_bytes,
    format_size,
    parse_size,
    rss_bytes,
    spare_bytes,
    usable_cores,
)

_MIB = 1 << 20
_NO_LIMIT_V1 = 9223372036854771712


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("700MB", 700_000_000),
        ("2GiB", 2 << 30),
        ("1.5GiB", 3 << 29),
        ("512 mib", 512 * _MIB),
        (" 10kB ", 10_000),
        ("1TB", 10**12),
        ("1073741824B", 1 << 30),
    ],
)
def test_sizes(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "700", "MB", "-1MB", "1,5GB", "700M", "7e2MB", "auto", "1GiBB", "٣MB"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match=re.escape(repr(text)) + ".*such as 700MB or 1.5GiB"):
        parse_size(text)


@given(st.text(max_size=8))
def test_any_text_is_a_size_or_a_configuration_error(text):
    with contextlib.suppress(ConfigError):
        assert parse_size(text) >= 0


def test_sizes_for_people():
    assert format_size(123_456_789) == "123 MB"
    assert format_size(12_345_678_900) == "12.3 GB"
    assert format_size(1_234_567, fine=True) == "1.23 MB"
    assert format_size(123_456_789, fine=True) == "0.12 GB"


def test_own_memory_is_what_the_kernel_says():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc to compare with")
    before = rss_bytes()
    # A map of its own: what the allocator has kept from other tests would not be new memory.
    held = mmap.mmap(-1, 32 * _MIB)
    held.write(bytes(range(1, 256)) * (32 * _MIB // 255))
    grown = rss_bytes()
    (said,) = re.findall(r"VmRSS:\s+(\d+) kB", status.read_text())
    assert grown - before >= 30 * _MIB
    assert abs(int(said) * 1024 - grown) < 4 * _MIB
    held.close()


def _write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _meminfo(available_mib):
    return f"MemTotal: 24000000 kB\nMemFree: 1 kB\nMemAvailable:   {available_mib << 10} kB\nHugePages: 0\n"


_V2_MOUNT = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
_V1_MOUNT = (
    "29 24 0:25 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n"
    "33 29 0:28 {top} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "36 29 0:31 {top} /sys/fs/cgroup/memory rw,relatime shared:15 master:3 - cgroup cgroup rw,memory\n"
)


def _v1_group(limit_mib, usage_mib, cached_mib=0):
    limit = _NO_LIMIT_V1 if limit_mib is None else limit_mib * _MIB
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{usage_mib * _MIB}\n",
        "memory.stat": f"active_file 0\ninactive_file 0\ntotal_active_file {cached_mib * _MIB}\n"
        "total_inactive_file 0\n",
    }


def _v2_group(limit_mib, usage_mib, cached_mib=0):
    return {
        "memory.max": "max\n" if limit_mib is None else f"{limit_mib * _MIB}\n",
        "memory.current": f"{usage_mib * _MIB}\n",
        "memory.stat": f"anon 5\nactive_file {cached_mib * _MIB}\ninactive_file 0\n",
    }


def _at(folder, files):
    return {f"{folder}/{name}": text for name, text in files.items()}


def test_free_memory_without_control_groups(tmp_path):
    _write(tmp_path, {"proc/meminfo": _meminfo(1500)})
    assert spare_bytes(tmp_path) == 1500 * _MIB
    assert cgroup_limit_bytes(tmp_path) is None


def test_a_system_that_tells_nothing(tmp_path):
    assert spare_bytes(tmp_path) is None
    assert 0 < auto_budget_bytes(tmp_path) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")


def test_limits_of_version_2_at_every_level_and_cached_pages_are_free(tmp_path):
    top = "sys/fs/cgroup"
    files = {
        "proc/meminfo": _meminfo(9000),
        "proc/self/cgroup": "0::/user.slice/app.scope\n",
        "proc/self/mountinfo": _V2_MOUNT,
        **_at(f"{top}/user.slice/app.scope", _v2_group(800, 300, cached_mib=50)),
        **_at(f"{top}/user.slice", _v2_group(None, 4000)),
    }
    _write(tmp_path, files)
    assert spare_bytes(tmp_path) == 550 * _MIB
    assert cgroup_limit_bytes(tmp_path) == 800 * _MIB
    _write(tmp_path, _at(f"{top}/user.slice", _v2_group(4100, 4000)))
    assert spare_bytes(tmp_path) == 100 * _MIB
    _write(tmp_path, _at(f"{top}/user.slice", _v2_group(3900, 4000)))
    assert spare_bytes(tmp_path) == 0


def test_limits_of_version_1_beside_an_empty_version_2(tmp_path):
    top = "sys/fs/cgroup/memory"
    files = {
        "proc/meminfo": _meminfo(9000),
        "proc/self/cgroup": "9:name=systemd:/x\n4:memory:/jobs/a:b\n1:cpu:/\n0::/\n",
        "proc/self/mountinfo": _V1_MOUNT.format(top="/")
        + "40 29 0:40 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        **_at(f"{top}/jobs/a:b", _v1_group(1400, 200, cached_mib=100)),
        **_at(f"{top}/jobs", _v1_group(None, 200)),
        **_at(top, _v1_group(None, 5000)),
    }
    _write(tmp_path, files)
    assert spare_bytes(tmp_path) == 1300 * _MIB


def test_a_container_that_sees_its_own_part_of_the_tree(tmp_path):
    files = {
        "proc/meminfo": _meminfo(9000),
        "proc/self/cgroup": "4:memory:/docker/0123\n",
        "proc/self/mountinfo": _V1_MOUNT.format(top="/docker/0123"),
        **_at("sys/fs/cgroup/memory", _v1_group(512, 12)),
    }
    _write(tmp_path, files)
    assert spare_bytes(tmp_path) == 500 * _MIB


def test_the_automatic_budget_leaves_a_margin(tmp_path):
    _write(tmp_path, {"proc/meminfo": _meminfo(2000)})
    assert abs(auto_budget_bytes(tmp_path) - rss_bytes() - 1800 * _MIB) < 4 * _MIB
    _write(tmp_path, {"proc/meminfo": _meminfo(100)})
    assert abs(auto_budget_bytes(tmp_path) - rss_bytes() - 36 * _MIB) < 4 * _MIB
    _write(tmp_path, {"proc/meminfo": _meminfo(10)})
    assert abs(auto_budget_bytes(tmp_path) - rss_bytes()) < 4 * _MIB


def test_this_machine_can_spare_something():
    spare = spare_bytes()
    assert spare is None or 0 < spare < 1 << 50


_KEEPS = """
import numpy as np
from tpilite.machine import keep_freed_memory, return_freed_memory, rss_bytes

keep_freed_memory()
before = rss_bytes()
for _ in range(2):
    np.ones(5 << 20, np.float32)  # 20 MiB, freed at once
print(rss_bytes() - before)
return_freed_memory()
print(rss_bytes() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this is about glibc")
def test_freed_memory_is_kept_until_it_is_returned():
    done = subprocess.run([sys.executable, "-c", _KEEPS], capture_output=True, text=True, check=True)
    kept, returned = map(int, done.stdout.split())
    assert 19 * _MIB < kept < 30 * _MIB
    assert returned < 4 * _MIB


@pytest.mark.parametrize(
    ("version", "inner", "outer", "n_cores"),
    [
        (2, "max 100000", "max 100000", 64),
        (2, "300000 100000", "max 100000", 3),
        (2, "max 100000", "250000 100000", 2),
        (2, "50000 100000", "800000 100000", 1),
        (2, "", "nonsense", 64),
        (1, "-1 100000", "-1 100000", 64),
        (1, "400000 100000", "200000 100000", 2),
        (1, "10000 100000", "-1 100000", 1),
    ],
)
def test_a_processor_quota_at_any_level_bounds_the_threads(
    tmp_path, monkeypatch, version, inner, outer, n_cores
):
    monkeypatch.setattr(machine, "physical_cores", lambda: 64)
    if version == 2:
        files = {"proc/self/cgroup": "0::/a/b\n", "proc/self/mountinfo": _V2_MOUNT}
        groups = {"sys/fs/cgroup/a/b/cpu.max": inner, "sys/fs/cgroup/a/cpu.max": outer}
    else:
        files = {"proc/self/cgroup": "4:cpu,cpuacct:/a/b\n", "proc/self/mountinfo": _V1_MOUNT.format(top="/")}
        groups = {}
        for folder, quota in (("a/b", inner), ("a", outer)):
            top = f"sys/fs/cgroup/cpu/{folder}"
            groups[f"{top}/cpu.cfs_quota_us"], groups[f"{top}/cpu.cfs_period_us"] = quota.split()
    _write(tmp_path, files | groups)
    assert usable_cores(tmp_path) == n_cores
