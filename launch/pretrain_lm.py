"""Pretrain an autoregressive language model: deepspeed launch/pretrain_lm.py --config FILE [--section.key value ...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatext.launch import launch

if __name__ == "__main__":
    launch("PretrainLMConfig", sys.argv[1:])
