"""Draws the time line that `--memory_report FILE` wrote: memory above, loads and caches below.

    python benchmarks/plot_memory.py memory.csv memory.png

Needs matplotlib (the `plot` extra).
"""

import argparse
import csv
from pathlib import Path


def read(path: Path) -> dict[str, list[float]]:
    """The columns of a report, by name; a last line that was cut off is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    return {name: [float(row[i]) for row in rows if len(row) == len(names)] for i, name in enumerate(names)}


def draw(columns: dict[str, list[float]], target: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    times = columns.pop("time_s")
    figure, (above, below) = pyplot.subplots(
        2, sharex=True, figsize=(10, 6), height_ratios=(3, 1), layout="constrained"
    )
    for name, values in columns.items():
        if name.endswith("_bytes") and name != "read_bytes":
            above.plot(times, [value / 1e6 for value in values], label=name.removesuffix("_bytes"))
    above.set_ylabel("MB")
    above.set_ylim(bottom=0)
    above.legend()
    reads = columns.get("read_bytes", [0.0] * len(times))
    rates = [
        (b - a) / max(1e-9, t - s) / 1e6
        for a, b, s, t in zip(reads, reads[1:], times, times[1:], strict=False)
    ]
    below.plot(times[1:], rates)
    below.set_ylabel("read, MB/s")
    below.set_xlabel("s")
    figure.savefig(target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="what --memory_report wrote")
    parser.add_argument("image", type=Path, help="the file to draw: .png, .svg or .pdf")
    args = parser.parse_args()
    draw(read(args.report), args.image)


if __name__ == "__main__":
    main()
