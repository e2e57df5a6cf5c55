"""Our generators in lm-evaluation-harness: `python -m evaluation.lm_eval_model run --model megatext --model_args
pretrained=DIR --tasks ...` takes every option of its command line, with `megatext` among the models.

Needs `pip install lm-eval`. Diffusion models answer `generate_until`; log-likelihoods are asked of causal LMs only.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401 (a registry that holds one model already does not look for the others)
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from evaluation.hub import model_directory
from evaluation.systems import open_model
from evaluation.systems.base import Item, Length
from evaluation.systems.causal_lm import CausalLM
from evaluation.systems.exported import Reconstruction
from megatext.config import ConfigError, cli_errors


@register_model("megatext")
class MegatextLM(TemplateLM):
    """A model that megatext exported, or any Hugging Face causal LM, as the harness asks it.

    Of a task's generation settings `until` and `max_gen_toks` are kept; how texts are sampled is said in model_args
    alone, so that it is the same for all tasks. A text depends on its prompt and `seed`, not on its batch.
    Log-likelihoods are of the model as it is, at temperature 1 and unguided, whatever the sampling.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 32,
        device: str | None = None,
        dtype: str = "fp32",
        max_gen_toks: int = 256,
        seed: int = 0,
        max_batch_size: int | None = None,
        **sampling: Any,
    ) -> None:
        """`sampling`: keys of SamplingConfig for a diffusion model (none: its own), of CausalSampling for a causal LM.
        Raises ConfigError for a key that is neither, and for a directory that cannot write."""
        super().__init__()
        if dtype not in ("fp32", "bf16"):
            raise ConfigError(f"dtype={dtype}: write fp32 or bf16")
        if not torch.cuda.is_available():
            device = "cpu"  # lm-eval's own default is cuda:0 wherever it runs
        self.system_device: str = device or "cuda"
        self.seed, self.max_gen_toks = seed, max_gen_toks
        directory = model_directory(str(pretrained), "pretrained=")
        self.system = open_model(directory, sampling, name="megatext", dtype=dtype, device=self.system_device)
        if isinstance(self.system, Reconstruction):
            raise ConfigError(f"pretrained={directory}: a TextVAE reconstructs texts and answers no prompts")
        self.rows = int(batch_size) if str(batch_size).isdigit() else 32  # `auto` is lm-eval's own word
        self.directory = directory

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation for each (context, settings), cut before the first of its `until`."""
        items, asked = [], Counter[str]()
        for request in requests:
            context, settings = request.args[0], normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            name = hashlib.sha256(context.encode("utf-8", "replace")).hexdigest()
            asked[name] += 1  # a prompt that is asked again (repeats) gets another text
            tokens = int(settings["max_gen_toks"])
            items.append(Item(f"{name}-{asked[name]}", context, "", Length("free", tokens)))
        texts = [""] * len(items)
        order = sorted(range(len(items)), key=lambda i: (-(items[i].length.tokens or 0), -len(items[i].prefix)))
        for start in tqdm(range(0, len(order), self.rows), desc="generate_until", disable=disable_tqdm):
            rows = order[start : start + self.rows]
            written = self.system.generate([items[i] for i in rows], self.seed)
            for i, found in zip(rows, written, strict=True):
                texts[i] = _cut(found.text, requests[i].args[1].get("until") or [])
        return texts

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._causal("loglikelihood")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of what the model reads."""
        system = self._causal("loglikelihood_rolling")
        longest = system.limit
        sums = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=longest, context_len=1
            )
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            sums.append(sum(found for found, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
        return sums

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether all are the likeliest) of each continuation behind its context."""
        system = self._causal("loglikelihood")
        longest, found = system.limit, [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for start in tqdm(range(0, len(order), self.rows), desc="loglikelihood", disable=disable_tqdm):
            batch = order[start : start + self.rows]
            # The last token is predicted, never read; a context too long is cut at its start.
            inputs = [(requests[i][1] + requests[i][2])[-longest - 1 : -1] for i in batch]
            width = max(map(len, inputs))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in inputs], device=self.system_device)
            logits = system.model(input_ids=ids, use_cache=False).logits.float().log_softmax(dim=-1)
            for row, i in enumerate(batch):
                wanted = torch.tensor(requests[i][2], device=self.system_device)
                own = logits[row, len(inputs[row]) - len(wanted) : len(inputs[row])]
                total = float(own.gather(1, wanted[:, None]).sum())
                found[i] = (total, bool((own.argmax(dim=-1) == wanted).all()))
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids, behind what stands before every text unless `add_special_tokens` is False."""
        system = self._causal("tokens")
        return [*([] if add_special_tokens is False else system.start), *system.tokenizer.encode(string)]

    @property
    def eot_token_id(self) -> int:
        return self._causal("eot_token_id").tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the begin-of-text where the model has one, else an end of text."""
        system = self._causal("prefix_token_id")
        bos = system.model.config.bos_token_id
        return int(bos) if isinstance(bos, int) else system.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.directory).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        return {"directory": str(self.directory), "fingerprint": self.system.fingerprint(), "seed": self.seed}

    def _causal(self, what: str) -> CausalLM:
        if not isinstance(self.system, CausalLM):
            raise ConfigError(
                f"{what}: {self.directory} is a diffusion model, which gives no log-likelihood of a text; choose tasks "
                "with output_type generate_until"
            )
        return self.system


def _cut(text: str, until: Sequence[str] | str) -> str:
    for stop in [until] if isinstance(until, str) else until:
        if stop:
            text = text.split(stop)[0]
    return text


if __name__ == "__main__":
    import runpy
    import sys

    # Run as a program this module is `__main__`; the one that registers the model has its own name.
    sys.modules.setdefault("evaluation.lm_eval_model", sys.modules[__name__])
    sys.path.insert(0, str(Path.cwd()))
    with cli_errors():
        runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)
