"""Pretrain a text autoencoder: deepspeed launch/pretrain_vae.py --config FILE [--section.key value ...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatext.launch import launch

if __name__ == "__main__":
    launch("PretrainVAEConfig", sys.argv[1:])
