"""What TextLDM's presets of full size take here: `python benchmarks/presets.py launch/configs/textldm/dit_*.yaml`.

The trainer's steps of each preset at its own sizes, but for the rows of a step (one micro-batch), on shards of random
tokens; a TextDiT on random weights of the autoencoder of `--vae`, an autoencoder without its teacher's states. Tokens a
second; MFU by the model's FLOPs against the vendor's dense bf16 peak (on a CPU a matrix product's, which is in the last
line in any case); memory; and the hours of the preset's steps at this speed.
"""

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import documents, report, write_shards
from train_step import make_trainer, matrix_product_flops, run_steps

from megatext.config import ConfigError, from_dict, read_yaml
from megatext.nn.text_vae import TextVAE, TextVAEConfig
from megatext.recipes import config_class, meta_module
from megatext.recipes.pretrained import write_model
from megatext.tokenizer import load_tokenizer
from megatext.training.engine import Processes, start_processes
from megatext.training.estimate import row_flops
from megatext.training.metrics import peak_tflops

WARMUP = 2
"""Steps that are not measured; the first compiles attention kernels on a GPU."""


def configuration(preset: Path, options: argparse.Namespace, folder: Path) -> Any:
    """A preset on the benchmark's shards and autoencoder, with one micro-batch a step."""
    content = read_yaml(preset)
    if not {"dit", "vae"} & set(content):
        raise ConfigError(f"{preset}: neither a TextDiT's preset nor a TextVAE's")
    content["data"] |= {"shards": str(folder / "shards"), "hidden_states": None}
    rows = options.rows or content["training"]["micro_batch_rows"]
    content["training"] |= {"rows_per_step": rows, "micro_batch_rows": rows, "validation_batches": 0}
    if options.compile is not None:
        content["training"]["compile"] = options.compile
    content |= {"run_dir": tempfile.mkdtemp(dir=folder), "save_every_steps": 10**9}
    if "dit" in content:
        content["dit"]["vae"] = str(folder / "vae")
        return from_dict(config_class("PretrainDiTConfig"), content, where=str(preset))
    content["vae"]["repa_weight"] = 0.0
    return from_dict(config_class("PretrainVAEConfig"), content, where=str(preset))


def measure(preset: Path, options: argparse.Namespace, folder: Path, processes: Processes) -> dict[str, float]:
    """The best of `--repeats` rounds of `--steps` steps."""
    config = configuration(preset, options, folder)
    planned = read_yaml(preset)
    trainer = make_trainer(config, options.deepspeed_config, processes)
    run_steps(trainer, WARMUP)
    if options.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = min(run_steps(trainer, options.steps) for _ in range(options.repeats))
    vocab_size = load_tokenizer(folder / "shards" / "tokenizer").vocab_size
    flops = row_flops(config, meta_module(config, vocab_size), vocab_size).model / config.data.row_tokens
    rate = config.training.rows_per_step * config.data.row_tokens / seconds
    tokens = planned["max_steps"] * planned["training"]["rows_per_step"] * config.data.row_tokens
    memory = torch.cuda.max_memory_allocated() / 2**30 if options.on_gpu else 0.0
    return {"tokens_per_second": rate, "model_tflops": rate * flops / 1e12, "memory_gib": memory,
            "rows": config.training.rows_per_step, "gpu_hours": tokens / rate / 3600}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--vae", type=Path, default=Path("launch/configs/textldm/vae_350m.yaml"), metavar="FILE")
    parser.add_argument("--tokenizer", default="Qwen/Qwen3-1.7B", help="its vocabulary counts: a name or a folder")
    parser.add_argument("--rows", type=int, help="rows of a step; default: the preset's micro-batch")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a round")
    parser.add_argument("--repeats", type=int, default=2, help="rounds; the best counts")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="training.compile, whatever the preset"
    )
    parser.add_argument("--deepspeed_config", type=Path, default=Path("ds_configs/zero1.json"))
    options = parser.parse_args()
    processes = start_processes()
    options.on_gpu = processes.device.type == "cuda"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = load_tokenizer(options.tokenizer)
        write_shards(folder / "shards", documents(2000, 600, 0, min(50_000, tokenizer.vocab_size)), tokenizer=tokenizer)
        if any("dit" in read_yaml(preset) for preset in options.presets):
            sizes = from_dict(TextVAEConfig, read_yaml(options.vae)["vae"]["network"], where=str(options.vae))
            weights = TextVAE(sizes, tokenizer.vocab_size).state_dict()
            write_model(folder / "vae", "text_vae", sizes, weights, tokenizer=folder / "shards" / "tokenizer")
        dtype, size = (torch.bfloat16, 8192) if options.on_gpu else (torch.float32, 1024)
        product = matrix_product_flops(processes.device, dtype, size) / 1e12
        peak = peak_tflops(processes.device) or product
        figures: dict[str, Any] = {}
        for preset in options.presets:
            figures[preset.stem] = measure(preset, options, folder, processes)
            print(json.dumps({preset.stem: figures[preset.stem]}), file=sys.stderr, flush=True)
            gc.collect()  # cycles would keep an engine, and count in the next one's memory
            torch.cuda.empty_cache()
    rows = [
        [name, f"{f['rows']}", f"{f['tokens_per_second']:,.0f}", f"{f['model_tflops']:.0f}"]
        + [f"{100 * f['model_tflops'] / peak:.1f} %", f"{f['memory_gib']:.0f} GiB", f"{f['gpu_hours']:,.0f}"]
        for name, f in figures.items()
    ]
    columns = ["preset", "rows", "tokens/s", "TFLOP/s", "MFU", "memory", "GPU-hours"]
    card = torch.cuda.get_device_name() if options.on_gpu else None
    found = {"presets": figures, "peak_tflops": peak, "matrix_product_tflops": product, "card": card}
    report("presets", columns, rows, found)


if __name__ == "__main__":
    main()
