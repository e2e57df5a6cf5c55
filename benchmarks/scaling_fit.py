"""The published points of Chinchilla's runs, fitted here, beside what their replication published:
`python benchmarks/scaling_fit.py svg_extracted_data.csv`.

The file is that of github.com/Besiroglu/data (arXiv 2404.10102): 245 points read off Chinchilla's figure, of which the
replication leaves out five outliers, the highest losses.
"""

import argparse
import csv
import time
from pathlib import Path

import numpy as np
from common import report

from megatext.scaling.fit import Points, fit_law

PUBLISHED = {"e": 1.8172, "a": 482.01, "b": 2085.43, "alpha": 0.3478, "beta": 0.3658}
"""The replication's table 1; that of Chinchilla itself: 1.6934, 406.4, 410.7, 0.3392, 0.2849."""
CHINCHILLA = {"e": 1.6934, "a": 406.4, "b": 410.7, "alpha": 0.3392, "beta": 0.2849}
OUTLIERS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("points", type=Path, help="svg_extracted_data.csv")
    options = parser.parse_args()
    with open(options.points, encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["loss"]))[:-OUTLIERS]
    n, c, loss = (np.array([float(row[key]) for row in rows]) for key in ("Model Size", "Training FLOP", "loss"))
    began = time.perf_counter()
    law = fit_law(Points(n, c / (6 * n), c, loss, c))
    seconds = time.perf_counter() - began
    table = [[key, f"{getattr(law, key):.4g}", f"{PUBLISHED[key]:.4g}", f"{CHINCHILLA[key]:.4g}"] for key in PUBLISHED]
    found = {key: getattr(law, key) for key in PUBLISHED}
    title = f"L = E + A/N^alpha + B/D^beta of {len(rows)} published points, fitted in {seconds:.1f} s"
    report(title, ["", "here", "replication", "Chinchilla"], table, found)


if __name__ == "__main__":
    main()
