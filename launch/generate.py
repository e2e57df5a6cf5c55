"""Write with an exported model: python launch/generate.py --model DIR --prompt TEXT (without --prompt it asks)"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatext.config import ConfigError, cli_errors, from_dict, to_dict


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Options of the call, and every field of SamplingConfig under its own name; None: as the model says."""
    from megatext.config_help import field_docs
    from megatext.recipes.sampling import SamplingConfig

    parser = argparse.ArgumentParser(
        prog="launch/generate.py",
        allow_abbrev=False,
        description="Continue a prompt with an exported model, block by block as it is written.",
    )
    model = "directory written by launch/export.py, or of Cola DLM's release"
    parser.add_argument("--model", type=Path, required=True, help=model)
    parser.add_argument("--prompt", help='text to continue, "" for a passage from nothing; not given: asks for prompts')
    parser.add_argument("--infill", metavar="TEXT", help="a text with gaps, {N} for N tokens: fill them")
    parser.add_argument("--trace", action="store_true", help="show what is to be read after every step")
    parser.add_argument("--max_tokens", type=int, default=64, help="tokens to write (default 64)")
    parser.add_argument("--samples", type=int, default=1, help="texts for each prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample; the next ones follow")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; default: a GPU where there is one")
    group = parser.add_argument_group("sampling", "what is not given is as the model's config.json says")
    docs = field_docs(SamplingConfig)
    for name, default in to_dict(SamplingConfig()).items():
        says = f"{docs[name]} ({default} where it says nothing)".replace("%", "%%")
        if isinstance(default, list):
            group.add_argument(f"--{name}", type=float, nargs=2, metavar=("LOW", "HIGH"), help=says)
        else:
            choices = get_args(get_type_hints(SamplingConfig)[name]) or None
            group.add_argument(f"--{name}", type=type(default), choices=choices, help=says)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Load the model once, then write."""
    options = parse_arguments(argv)
    with cli_errors():
        import torch

        from megatext.generation import SamplingConfig, TextGenerator

        given = {name: getattr(options, name) for name in to_dict(SamplingConfig())}
        given = {name: value for name, value in given.items() if value is not None}
        from_dict(SamplingConfig, given, where="command line")  # what is wrong is said before the weights are read
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if options.max_tokens < 1 or options.samples < 1:
            raise ConfigError("--max_tokens and --samples must be at least 1")
        if options.infill is not None and (options.prompt is not None or options.trace):
            raise ConfigError("--infill goes with neither --prompt nor --trace")
        generator = TextGenerator.from_pretrained(options.model, device=device)
        sampling = from_dict(SamplingConfig, to_dict(generator.sampling) | given, where="command line")
        if options.infill is not None:
            infill(generator, options, sampling)
            return
        if options.prompt is not None:
            write(generator, options.prompt, options, sampling)
        while options.prompt is None:
            try:
                prompt = input("prompt (ctrl-D ends)> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            write(generator, prompt, options, sampling)


def infill(generator: Any, options: argparse.Namespace, sampling: Any) -> None:
    """Print the text with its gaps filled."""
    parts = re.split(r"\{(\d+)\}", options.infill)
    pieces = [int(part) if i % 2 else part for i, part in enumerate(parts) if part]
    seeds = [options.seed + sample for sample in range(options.samples)]
    for text in generator.infill([pieces] * options.samples, seeds=seeds, sampling=sampling):
        print(text)


def write(generator: Any, prompt: str, options: argparse.Namespace, sampling: Any) -> None:
    """Print the continuations of one prompt as they are written, or with --trace step by step."""
    for sample in range(options.samples):
        if options.trace:
            more = {"target_tokens": options.max_tokens, "seed": options.seed + sample, "sampling": sampling}
            for step, text in enumerate(generator.trace(prompt, **more), 1):
                print(f"step {step:3d} | {text!r}")
            continue
        print(prompt, end="", flush=True)
        for piece in generator.stream(
            prompt, target_tokens=options.max_tokens, seed=options.seed + sample, sampling=sampling
        ):
            print(piece, end="", flush=True)
        print("\n" if options.samples > 1 else "")


if __name__ == "__main__":
    main(sys.argv[1:])
