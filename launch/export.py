"""Turn a run into a model directory: python launch/export.py --run DIR [--ema DECAY | --raw] [--step N] --output DIR"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatext.config import cli_errors
from megatext.export import main

if __name__ == "__main__":
    with cli_errors():
        main(sys.argv[1:])
