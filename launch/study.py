"""Train the variants of a study, score them, make their table; continue where it was interrupted.

python launch/study.py --config launch/configs/studies/ldlm.yaml [--jobs 2] [--only RUN ...] [--seeds N]
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatext.config import cli_errors  # noqa: E402
from megatext.stages import run_or_exit  # noqa: E402
from megatext.study import Study  # noqa: E402


def main() -> None:
    """Build the stages, run them, show the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a file of launch/configs/studies")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="commands at a time; they share the cores")
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN", help="these runs, and those they stand on")
    parser.add_argument("--seeds", type=int, metavar="N", help="the first N seeds of every run only")
    parser.add_argument("--corpus", metavar="INPUT", help="text instead of the study's, as data_tools.shard takes it")
    parser.add_argument("--judge", metavar="MODEL", help="causal LM that scores, instead of the study's")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    options = parser.parse_args()
    os.chdir(ROOT)  # the commands and the presets' paths start at the root of the repository
    with cli_errors():
        study = Study(
            options.config,
            corpus=options.corpus,
            judge=options.judge,
            only=options.only,
            seeds=options.seeds,
            jobs=max(1, options.jobs),
        )
        if options.list:
            print("\n".join(stage.shell() for stage in study.stages))
            return
        study.write_files()
        run_or_exit(study.stages, study.work_dir, jobs=study.jobs, keep_going=True)
        from evaluation.scoring import load_results
        from evaluation.table import console_table

        print(f"\n{console_table(load_results(study.table))}\n\nreport: {study.table / 'report.html'}")


if __name__ == "__main__":
    main()
