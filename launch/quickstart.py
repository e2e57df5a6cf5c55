"""From raw text to scored samples: prints every stage's command, runs it, continues where it was interrupted.

python launch/quickstart.py --configs launch/configs/quickstart [--recipe default|textldm_paper|cola|ldlm]
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatext.config import cli_errors  # noqa: E402
from megatext.quickstart import RECIPES, Quickstart  # noqa: E402
from megatext.stages import run_or_exit  # noqa: E402


def main() -> None:
    """Build the stages, run them, show the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configs", type=Path, required=True, metavar="DIR", help="preset, a folder of launch/configs")
    parser.add_argument("--recipe", choices=RECIPES, default="default", help="which system is trained")
    parser.add_argument("--num_processes", type=int, default=1, metavar="N", help="ranks of every training stage")
    parser.add_argument("--corpus", metavar="INPUT", help="text instead of the preset's, as data_tools.shard takes it")
    parser.add_argument("--teacher", metavar="MODEL", help="Hugging Face causal LM to align with, not the baseline")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    options = parser.parse_args()
    os.chdir(ROOT)  # the commands and the presets' paths start at the root of the repository
    with cli_errors():
        quickstart = Quickstart(
            options.configs,
            recipe=options.recipe,
            num_processes=options.num_processes,
            corpus=options.corpus,
            teacher=options.teacher,
        )
        if options.list:
            print("\n".join(stage.shell() for stage in quickstart.stages))
            return
        run_or_exit(quickstart.stages, quickstart.work_dir)
        from evaluation.scoring import load_results
        from evaluation.table import console_table

        print(f"\n{console_table(load_results(quickstart.results))}\n")
        print(f"report: {quickstart.results / 'report.html'}   results: {quickstart.results / 'results.json'}")


if __name__ == "__main__":
    main()
