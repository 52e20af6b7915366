"""The promise of a memory budget: the peak of the process by its budget, in twenty settings.

    python benchmarks/budget.py [--model tpi-207m] [--only WORDS]

Every setting is a process of its own. Printed is the peak of its resident memory, mapped files included, by
the budget: at most 1.00. Long prompts take several passes of the most rows; parallel ones are texts of
different lengths, whose caches grow together.
"""

import argparse
import itertools
import json
import subprocess
import sys
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    parser.set_defaults(model="tpi-207m")
    parser.add_argument("--only", default="", help="settings whose line begins so")
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
        command = [sys.executable, str(Path(__file__)), "--spec", json.dumps(spec)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}  {done.stderr.strip().splitlines()[-1]}")
            continue
        found = json.loads(done.stdout)
        ratio = found["peak_bytes"] / spec["budget_bytes"]
        worst = max(worst, ratio)
        print(
            f"{name}  budget {spec['budget_bytes'] / 1e6:.0f} MB  peak {found['peak_bytes'] / 1e6:.0f} MB  "
            f"ratio {ratio:.3f}  {found['paging']}",
            flush=True,
        )
    print(f"worst {worst:.3f}")


if __name__ == "__main__":
    main()
