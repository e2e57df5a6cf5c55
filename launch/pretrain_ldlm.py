"""Pretrain LDLM, autoencoder and DiT together: deepspeed launch/pretrain_ldlm.py --config FILE [--key value ...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatext.launch import launch

if __name__ == "__main__":
    launch("PretrainLDLMConfig", sys.argv[1:])
