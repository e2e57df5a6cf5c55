"""Pretrain a diffusion transformer on text latents: deepspeed launch/pretrain_dit.py --config FILE [--key value ...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatext.launch import launch

if __name__ == "__main__":
    launch("PretrainDiTConfig", sys.argv[1:])
