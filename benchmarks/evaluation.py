"""Metrics beside the packages they equal: ROUGE, self-BLEU and BERTScore on the same texts in one run; what a second
system costs; how much memory scoring takes without models.

    python benchmarks/evaluation.py [--input TEXT.jsonl.gz ...]

Peers (rouge-score, bert-score, sacrebleu) are in requirements-dev.txt. Numbers are checked to be equal before times are
told. sacrebleu is timed on some texts against all others and scaled up: a text's BLEU does not depend on the others'.
"""

import argparse
import json
import logging
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)  # this file's own folder would hide the package `evaluation` behind this file

from benchmarks.common import best_of, report  # noqa: E402

WORDS_A_TEXT = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", default=[], help="real text (any input of data_tools.shard)")
    parser.add_argument("--texts", type=int, default=1000, help="of 500 words each; pairs for ROUGE")
    parser.add_argument("--bleu-texts", type=int, default=10, help="that sacrebleu is timed on")
    parser.add_argument("--bert-pairs", type=int, default=50, help="for BERTScore, by a random BERT of 6 layers")
    parser.add_argument("--repeats", type=int, default=2, help="rounds; the best counts")
    options = parser.parse_args()
    texts = _texts(options.input, 2 * options.texts)
    targets, written = texts[::2], texts[1::2]
    rows: list[list[str]] = []
    figures: dict[str, Any] = {"texts": options.texts, "words_a_text": WORDS_A_TEXT, "real_text": bool(options.input)}
    for stem in (False, True):
        _rouge(targets, written, stem, options.repeats, rows, figures)
    _self_bleu(written, options.bleu_texts, options.repeats, rows, figures)
    with tempfile.TemporaryDirectory() as folder:
        _bertscore(targets, written, options.bert_pairs, options.repeats, Path(folder), rows, figures)
        _second_system(targets, written, Path(folder), rows, figures)
        _memory(texts, Path(folder), rows, figures)
    report("evaluation", ["what", "megatext", "peer", "ratio"], rows, figures)


def _texts(inputs: Sequence[str], count: int) -> list[str]:
    """Texts of 500 words: pieces of real documents, or words of a Zipf distribution."""
    if not inputs:
        draw = random.Random(0)
        vocabulary = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(20_000)]
        weights = [1 / (rank + 3) for rank in range(len(vocabulary))]
        return [" ".join(draw.choices(vocabulary, weights, k=WORDS_A_TEXT)) for _ in range(count)]
    from data_tools import sources

    words: Iterator[str] = (w for c in sources.read(inputs) for d in sources.decode(c)[0] for w in d.text.split())
    pieces = [" ".join(word for _, word in zip(range(WORDS_A_TEXT), words, strict=False)) for _ in range(count)]
    if len(pieces[-1].split()) < WORDS_A_TEXT:
        raise SystemExit(f"--input: holds fewer than {count * WORDS_A_TEXT:,} words; give more, or a smaller --texts")
    return pieces


def _race(contestants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Best seconds of each, in turns."""

    def timed(run: Callable[[], Any]) -> Callable[[], float]:
        def once() -> float:
            began = time.perf_counter()
            run()
            return 1 / (time.perf_counter() - began)

        return once

    return {k: 1 / v for k, v in best_of({k: timed(run) for k, run in contestants.items()}, repeats).items()}


def _rouge(targets: list[str], written: list[str], stem: bool, repeats: int, rows: Any, figures: Any) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    from evaluation.metrics import rouge

    names = ["rouge1", "rouge2", "rougeL"]
    peer = RougeScorer(names, use_stemmer=stem)
    found: dict[str, list[Any]] = {}

    def ours() -> None:
        rouge.tokenize.cache_clear()
        rouge._stem.cache_clear()
        found["ours"] = [rouge.rouge(t, w, stem=stem) for t, w in zip(targets, written, strict=True)]

    def theirs() -> None:
        found["theirs"] = [peer.score(t, w) for t, w in zip(targets, written, strict=True)]

    seconds = _race({"ours": ours}, repeats) | _race({"theirs": theirs}, 1)
    for a, b in zip(found["ours"], found["theirs"], strict=True):
        assert {n: tuple(a[n]) for n in names} == {n: tuple(b[n]) for n in names}, "ROUGE differs from rouge-score"
    what = f"ROUGE-1/2/L{', stemmed' if stem else ''}, {len(targets)} pairs, s"
    _add(rows, figures, what, f"rouge{'_stemmed' if stem else ''}", seconds["ours"], seconds["theirs"])


def _self_bleu(texts: list[str], some: int, repeats: int, rows: Any, figures: Any) -> None:
    import sacrebleu

    logging.getLogger("sacrebleu").setLevel(logging.ERROR)  # advises another setting at every sentence
    from evaluation.metrics.diversity import self_bleu

    words = [text.split() for text in texts]
    metric = sacrebleu.BLEU(tokenize="none", smooth_method="none", effective_order=False)
    found: dict[str, list[float]] = {}

    def ours() -> None:
        found["ours"] = self_bleu(words)

    def theirs() -> None:
        found["theirs"] = [metric.sentence_score(texts[i], texts[:i] + texts[i + 1 :]).score for i in range(some)]

    seconds = _race({"ours": ours}, repeats) | _race({"theirs": theirs}, 1)
    largest = max(abs(a - b) for a, b in zip(found["ours"], found["theirs"], strict=False))
    assert largest < 1e-9, f"self-BLEU differs from sacrebleu by {largest}"
    whole = seconds["theirs"] * len(texts) / some
    _add(
        rows,
        figures,
        f"self-BLEU, {len(texts)} texts, s (sacrebleu: scaled from {some})",
        "self_bleu",
        seconds["ours"],
        whole,
    )


def _bertscore(
    targets: list[str], written: list[str], pairs: int, repeats: int, folder: Path, rows: Any, figures: Any
) -> None:
    import bert_score
    import numpy as np

    from evaluation.metrics.bertscore import bertscore
    from evaluation.metrics.encoder import Encoder

    model = _random_bert(folder / "bert", targets[:100])
    # Ragged, as continuations are.
    chosen = [
        (" ".join(w.split()[: 30 + 7 * i % 350]), " ".join(t.split()[: 30 + 11 * i % 350]))
        for i, (w, t) in enumerate(zip(written[:pairs], targets[:pairs], strict=True))
    ]
    encoder, found = Encoder(model), {}  # type: ignore[var-annotated]
    scorer = bert_score.BERTScorer(model_type=str(model), num_layers=5, device="cpu")

    def ours() -> None:
        found["ours"] = [s.fmeasure for s in bertscore(encoder, chosen, layer=5)]

    def theirs() -> None:
        found["theirs"] = scorer.score([c for c, _ in chosen], [r for _, r in chosen])[2].tolist()

    seconds = _race({"ours": ours, "theirs": theirs}, repeats)
    assert np.abs(np.subtract(found["ours"], found["theirs"])).max() < 1e-6, "BERTScore differs from bert-score"
    _add(rows, figures, f"BERTScore, {pairs} pairs, s", "bertscore", seconds["ours"], seconds["theirs"])


def _random_bert(folder: Path, texts: list[str]) -> Path:
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast  # type: ignore[attr-defined]

    folder.mkdir()
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator(texts, vocab_size=8000, show_progress=False)
    pieces.save_model(str(folder))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=pieces.get_vocab_size(), hidden_size=384, num_hidden_layers=6, num_attention_heads=6,
        intermediate_size=1536,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def _second_system(targets: list[str], written: list[str], folder: Path, rows: Any, figures: Any) -> None:
    """Texts that are featurised for MAUVE when one system is scored, and when one more is on the same manifest."""
    from evaluation.__main__ import main as evaluation
    from evaluation.metrics.encoder import Encoder

    documents, output, some = folder / "documents.jsonl", folder / "second", min(200, len(targets))
    documents.write_text(
        "".join(json.dumps({"text": f"{t[:300]} {w[:300]}"}) + "\n" for t, w in zip(targets, written, strict=True))
    )
    task = folder / "task.yaml"
    task.write_text(f"name: second\nsource: {documents}\nn: {some}\nreference_tokenizer: null\n")
    featurised, original = [0], Encoder.last_token

    def counted(self: Encoder, sequences: Any) -> Any:
        featurised[0] += len(sequences)
        return original(self, sequences)

    Encoder.last_token = counted  # type: ignore[method-assign]
    counts = []
    for systems in (["a=repeat"], ["a=repeat", f"b=jsonl:{folder / 'b.jsonl'}"]):
        featurised[0] = 0
        options = [part for system in systems for part in ("--system", system)]
        with redirect_stdout(StringIO()):
            evaluation(["run", "--task", str(task), *options, "--metrics", "mauve", "--output", str(output),
                        "--featuriser", str(folder / "bert"), "--mauve-seeds", "1", "--device", "cpu"])  # fmt: skip
        counts.append(featurised[0])
        samples = [json.loads(line) for line in (output / "second" / "manifest.jsonl").read_text().splitlines()]
        texts = [{"id": sample["id"], "text": written[i][-300:]} for i, sample in enumerate(samples)]
        (folder / "b.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    assert counts[1] == some, f"a second system of {some} texts had {counts[1]} featurised"
    Encoder.last_token = original  # type: ignore[method-assign]
    rows.append([f"texts featurised, first system of {some} samples (human, ceiling, own)", str(counts[0]), "", ""])
    rows.append(["texts featurised, second system", str(counts[1]), "", ""])
    figures["featurised"] = {"first": counts[0], "second": counts[1]}


def _memory(texts: list[str], folder: Path, rows: Any, figures: Any) -> None:
    """Largest resident memory of all stages without models, in a process of its own."""
    documents = folder / "long.jsonl"
    documents.write_text(
        "".join(json.dumps({"text": f"{a} {b}"}) + "\n" for a, b in zip(texts[::2], texts[1::2], strict=True))
    )
    task = folder / "memory.yaml"
    task.write_text(f"name: memory\nsource: {documents}\nn: {len(texts) // 2}\nreference_tokenizer: null\n")
    systems = ["--system", "a=repeat", "--system", "b=other", "--system", "c=empty"]
    arguments = [
        "run",
        "--task",
        str(task),
        *systems,
        "--metrics",
        "rouge,diversity",
        "--output",
        str(folder / "memory"),
    ]
    # ru_maxrss of a child begins at its parent's: the child itself reads its own high-water mark.
    script = (
        "import sys; from evaluation.__main__ import main; main(sys.argv[1:]); print(open('/proc/self/status').read())"
    )
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) / 2**20  # type: ignore[index]
    rows.append([f"peak memory without models, {len(texts) // 2} samples, GiB", f"{peak:.2f}", "", ""])
    figures["peak_gib"] = round(peak, 3)


def _add(rows: Any, figures: Any, what: str, key: str, ours: float, theirs: float) -> None:
    rows.append([what, f"{ours:.2f}", f"{theirs:.1f}", f"{theirs / ours:.1f} x"])
    figures[key] = {"seconds": round(ours, 3), "peer_seconds": round(theirs, 2), "ratio": round(theirs / ours, 1)}


if __name__ == "__main__":
    main()
