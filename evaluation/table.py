"""The table of a results.json: columns, marks and footnotes, as the console, Markdown and the report show them."""

from dataclasses import dataclass
from typing import Any, Literal

MARKS = "†‡*§"
"""Marks that hang behind a cell and point to a footnote."""


@dataclass(frozen=True)
class Column:
    """A metric as it is shown."""

    key: str
    """Its name in results.json."""
    heading: str
    """Its name in tables."""
    digits: int
    """Decimals."""
    family: Literal["paper", "fluency", "diversity", "cost"]
    """`paper`: a column of TextLDM's Table 1."""
    help: str
    """What it means, in a sentence or two."""


COLUMNS = (
    Column("rouge1", "ROUGE-1", 1, "paper", "Words shared with the human continuation, F1 in percent."),
    Column("rouge2", "ROUGE-2", 1, "paper", "Word pairs shared with the human continuation, F1 in percent."),
    Column("rougeL", "ROUGE-L", 1, "paper", "Longest common subsequence of words, F1 in percent."),
    Column(
        "bertscore", "BERTScore", 1, "paper",
        "Token states matched with the human continuation by cosine, F1 in percent, not rescaled.",
    ),
    Column(
        "mauve", "MAUVE", 1, "paper",
        "Closeness of the distributions of texts, percent; mean over k-means seeds. Comparable at equal n only.",
    ),
    Column(
        "gap", "G", 3, "fluency",
        "Judge gap: 0 is human text, 1 is the same tokens in random order. Lower is better, at human entropy.",
    ),
    Column(
        "generative_perplexity", "gen. PPL", 1, "fluency",
        "Perplexity of the continuation given its prefix, under the judge. Low values count only at human entropy and "
        "repetition.",
    ),
    Column("nll", "nll", 2, "fluency", "Nats a token the judge needs for the continuation given its prefix."),
    Column(
        "entropy", "entropy", 2, "fluency",
        "Entropy in nats of the judge's tokens used, at one token budget for all rows. Far below human: few words.",
    ),
    Column(
        "bits_per_character", "bits/char", 3, "fluency",
        "Bits a character of the human continuation costs under the system; § marks an upper bound.",
    ),
    Column("repetition4", "rep-4", 3, "fluency", "Share of a text's 4-grams of judge tokens that it had before."),
    *(
        Column(
            f"distinct{n}", f"distinct-{n}", 3, "diversity",
            f"Distinct over all {n}-grams of words, at one number of words for all rows.",
        )
        for n in (1, 2, 3, 4)
    ),
    Column("self_bleu", "self-BLEU", 1, "diversity", "BLEU-4 of each text against all others: high if all are alike."),
    Column("length_ratio", "length", 2, "diversity", "Words written over the words of the human continuations."),
    Column("copied4", "copied", 3, "diversity", "Share of 4-grams of words that stand in the prefix."),
    Column("empty", "empty", 3, "diversity", "Share of texts without a word."),
    Column(
        "bertscore_rescaled", "BERTScore, rescaled", 1, "paper",
        "BERTScore spread between unrelated sentences (0) and equality (100).",
    ),
    Column(
        "training_pflops", "PFLOPs", 3, "cost",
        "10^15 floating-point operations of the training, and of that of every model it stands on.",
    ),
    Column("seconds", "s/sample", 3, "cost", "Seconds of wall time a continuation, within its batch."),
)  # fmt: skip
BY_KEY = {column.key: column for column in COLUMNS}

CONSOLE = (
    "gap", "generative_perplexity", "entropy", "repetition4", "distinct2", "bits_per_character",
    "rouge1", "rouge2", "rougeL", "bertscore", "mauve", "seconds",
)  # fmt: skip
"""What a terminal has room for."""


def table(results: dict[str, Any], keys: tuple[str, ...] = CONSOLE) -> tuple[list[str], list[list[str]], list[str]]:
    """(headings, rows of formatted cells, footnotes) of a results.json."""
    headings = ["system", *(BY_KEY[key].heading for key in keys)]
    rows = [[system["name"], *(cell(system, key) for key in keys)] for system in results["systems"]]
    marks = {mark for row in rows for text in row[1:] for mark in MARKS if text.endswith(mark)}
    return headings, rows, footnotes(results, marks)


def cell(system: dict[str, Any], key: str) -> str:
    """A metric of a system with its mark, - where there is none."""
    found = number(system, key)
    if found is None:
        return "-"
    mark = ""
    if key in ("gap", "generative_perplexity"):
        mark = "†" if system["is_judge"] else "*" if system["started_from_judge"] else ""
    if system["metrics"].get(key, {}).get("below_budget"):
        mark = "‡"
    if system["metrics"].get(key, {}).get("bound"):
        mark = "§"
    text = f"{found:.{BY_KEY[key].digits}f}"
    return (text.removeprefix("-") if float(text) == 0 else text) + mark


def number(system: dict[str, Any], key: str) -> float | None:
    """A metric's value, None where there is none."""
    if key == "training_pflops":
        return system["training_flops"] / 1e15 if system.get("training_flops") else None
    return system["seconds_per_sample"] if key == "seconds" else system["metrics"].get(key, {}).get("value")


def footnotes(results: dict[str, Any], marks: set[str]) -> list[str]:
    """What the marks mean, and the notes of the scoring."""
    notes = []
    if "†" in marks:
        notes.append(
            "† judges itself: this system is the judge, so its G and perplexity say how it samples, not how good it is."
        )
    if "*" in marks:
        notes.append(
            "* started from the judge's weights and may share its tastes: score again with a judge of another seed."
        )
    if "‡" in marks:
        notes.append("‡ wrote fewer tokens than the other rows are measured on.")
    if "§" in marks:
        found = {s["metrics"]["bits_per_character"]["estimator"] for s in results["systems"] if _is_bound(s)}
        notes.append(f"§ an upper bound: {', '.join(sorted(found))}.")
    cut = [f"{s['name']} {s['prefixes_cut']}" for s in results["systems"] if s["prefixes_cut"]]
    if cut:
        notes.append(f"Prefixes cut at their start because the model does not read more: {', '.join(cut)}.")
    return notes + results["notes"]


def console_table(results: dict[str, Any]) -> str:
    """The table with aligned columns, for a terminal."""
    headings, rows, notes = table(results)
    shown = [i for i in range(len(headings)) if i == 0 or any(row[i] != "-" for row in rows)]
    headings, rows = [headings[i] for i in shown], [[row[i] for i in shown] for row in rows]
    widths = [max(len(row[i].rstrip(MARKS)) for row in [headings, *rows]) for i in range(len(headings))]

    def line(cells: list[str]) -> str:
        # Marks hang behind the column, so that digits stay under digits.
        marks = [text[len(text.rstrip(MARKS)) :] for text in cells]
        bare = [text.rstrip(MARKS) for text in cells]
        padded = [bare[0].ljust(widths[0])] + [
            text.rjust(width) for text, width in zip(bare[1:], widths[1:], strict=True)
        ]
        return " ".join(text + mark.ljust(1) for text, mark in zip(padded, marks, strict=True)).rstrip()

    task = results["manifest"]
    head = f"{task['name']}: {task['n']} continuations, manifest {task['hash'][:12]}, seed {results['seed']}"
    rule = "-" * len(line(headings))
    return "\n".join([head, line(headings), rule, *map(line, rows), rule, *notes])


def _is_bound(system: dict[str, Any]) -> bool:
    return bool(system["metrics"].get("bits_per_character", {}).get("bound"))
