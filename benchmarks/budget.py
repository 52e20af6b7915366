"""The promise of a memory budget: the peak of the process by its budget, in twenty settings.

    python benchmarks/budget.py [--model tpi-207m] [--only WORDS] [--control_group FOLDER]

Every setting is a process of its own. Printed is the peak of its resident memory, mapped files included, by
the budget: at most 1.00. Long prompts take several passes of the most rows; parallel ones are texts of
different lengths, whose caches grow together. With a control group's folder (/sys/fs/cgroup/memory where
memory is of version 1), each runs in a group below it whose limit is the budget, and the system's killings
are printed, too; that takes the rights of root.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models import add_model_options, model_of

# Of the weights, what the budget is; and how many tokens the prompts have.
_BUDGETS = {"small": 0.62, "half": 0.8, "most": 1.1}
# Each list is begun at once; the next one when it is finished, so that caches are freed and made anew.
_PROMPTS = {
    "short": [[5], [9]],
    "long": [[1500], [1300], [1600]],
    "parallel": [[700, 300, 40], [500, 450, 350, 20]],
}


def settings() -> list[dict[str, Any]]:
    """Twenty settings: every prompt with 1 to 3 threads and both kinds of caches, and other budgets."""
    every = itertools.product(_PROMPTS, (1, 2, 3), ("f32", "f16"))
    others = [("long", 2, "f32", "half"), ("long", 2, "f32", "most")]
    keys = ("prompts", "threads", "kv_dtype", "budget")
    return [dict(zip(keys, values, strict=True)) for values in [*((*e, "small") for e in every), *others]]


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """The peak of this process, which makes the texts."""
    from tpilite import LLM, SamplingParams
    from tpilite.machine import peak_rss_bytes

    with LLM(
        spec["folder"],
        memory_budget=spec["budget_bytes"],
        threads=spec["threads"],
        kv_dtype=spec["kv_dtype"],
    ) as llm:
        for lengths in _PROMPTS[spec["prompts"]]:
            prompts = [[1 + (i + 7 * n) % 1000 for i in range(n)] for n in lengths]
            requests = [llm.start(prompt, SamplingParams(length=8, ignore_eos=True)) for prompt in prompts]
            for request in requests:
                for _ in llm.run(request):
                    pass
            assert all(len(request.new_ids) == 8 for request in requests)
        return {"peak_bytes": peak_rss_bytes(), "paging": str(llm.usage.paging)}


@contextmanager
def control_group(parent: Path | None, limit_bytes: int) -> Iterator[Path | None]:
    """A control group below `parent`, with this limit and, where there is one, the same with swap."""
    if parent is None:
        yield None
        return
    folder = parent / f"tpilite_{os.getpid()}"
    folder.mkdir()
    try:
        for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max"):
            if (folder / name).exists():
                (folder / name).write_text(str(limit_bytes))
        if (folder / "memory.swap.max").exists():
            (folder / "memory.swap.max").write_text("0")
        yield folder
    finally:
        folder.rmdir()


def n_killed(folder: Path) -> int:
    """How many processes the system has killed there for want of memory."""
    name = "memory.oom_control" if (folder / "memory.oom_control").exists() else "memory.events"
    values = dict(line.split() for line in (folder / name).read_text().splitlines())
    return int(values["oom_kill"])


def run(spec: dict[str, Any], parent: Path | None) -> tuple[dict[str, Any] | None, str]:
    """What `measure` found in a process of its own, and what else there is to say."""
    command = [sys.executable, str(Path(__file__)), "--spec", json.dumps(spec)]
    with control_group(parent, spec["budget_bytes"]) as folder:
        if folder is not None:
            command = ["sh", "-c", f'echo 0 > {folder}/cgroup.procs && exec "$@"', "sh", *command]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        killed = "" if folder is None else f"  killed {n_killed(folder)}"
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] + killed
    return json.loads(done.stdout), killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    parser.set_defaults(model="tpi-207m")
    parser.add_argument("--only", default="", help="settings whose line begins so")
    parser.add_argument("--control_group", type=Path, help="run each setting in a group below this one")
    parser.add_argument("--spec", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.spec:
        print(json.dumps(measure(json.loads(args.spec))))
        return
    folder = model_of(args)
    weights = (folder / "model.safetensors").stat().st_size
    worst = 0.0
    for spec in settings():
        name = f"{spec['prompts']:<8} {spec['threads']} threads {spec['kv_dtype']} {spec['budget']:<5}"
        if not name.startswith(args.only):
            continue
        spec |= {"folder": str(folder), "budget_bytes": int(_BUDGETS[spec["budget"]] * weights)}
        found, more = run(spec, args.control_group)
        if found is None:
            print(f"{name}  {more}", flush=True)
            worst = float("inf")
            continue
        ratio = found["peak_bytes"] / spec["budget_bytes"]
        worst = max(worst, ratio)
        print(
            f"{name}  budget {spec['budget_bytes'] / 1e6:.0f} MB  peak {found['peak_bytes'] / 1e6:.0f} MB  "
            f"ratio {ratio:.3f}  {found['paging']}{more}",
            flush=True,
        )
    print(f"worst {worst:.3f}")


if __name__ == "__main__":
    main()
