"""The table of a results.json: columns, marks and footnotes, as the console, Markdown and the report show them."""

from typing import Any

MARKS = "†‡*"
"""Marks that hang behind a cell and point to a footnote."""

# The console's and the report's table: (key, heading, digits).
COLUMNS = (
    ("gap", "G", 3),
    ("nll", "nll", 2),
    ("entropy", "entropy", 2),
    ("distinct2", "distinct-2", 3),
    ("rouge1", "ROUGE-1", 1),
    ("rouge2", "ROUGE-2", 1),
    ("rougeL", "ROUGE-L", 1),
    ("bertscore", "BERTScore", 1),
    ("mauve", "MAUVE", 1),
)


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """(headings, rows of formatted cells, footnotes) of a results.json."""
    headings = ["system", *(heading for _, heading, _ in COLUMNS), "s/sample"]
    rows, footnotes = [], []
    for system in results["systems"]:
        cells = [system["name"]]
        for key, _, digits in COLUMNS:
            metric = system["metrics"].get(key)
            text = "-" if metric is None or metric["value"] is None else f"{metric['value']:.{digits}f}"
            if key == "gap" and text != "-":
                text += "†" if system["is_judge"] else "*" if system["started_from_judge"] else ""
            if key in ("entropy", "distinct2") and text != "-" and metric["below_budget"]:
                text += "‡"
            cells.append(text)
        seconds = system["seconds_per_sample"]
        cells.append("-" if seconds is None else f"{seconds:.3f}")
        rows.append(cells)
    if any(cell.endswith("†") for row in rows for cell in row):
        footnotes.append(
            "† judges itself: this system is the judge, so its G and nll say how it samples, not how good it is."
        )
    if any(cell.endswith("*") for row in rows for cell in row):
        footnotes.append(
            "* started from the judge's weights and may share its tastes: score again with a judge of another seed."
        )
    if any(cell.endswith("‡") for row in rows for cell in row):
        budget = results["parameters"]["judge"]["token_budget"]
        footnotes.append(f"‡ wrote fewer than the {budget} tokens that the other rows are measured on.")
    return headings, rows, footnotes + results["notes"]


def console_table(results: dict[str, Any]) -> str:
    """The table with aligned columns, for a terminal."""
    headings, rows, footnotes = table(results)
    widths = [max(len(row[i].rstrip(MARKS)) for row in [headings, *rows]) for i in range(len(headings))]

    def line(cells: list[str]) -> str:
        # Marks hang behind the column, so that digits stay under digits.
        marks = [cell[len(cell.rstrip(MARKS)) :] for cell in cells]
        bare = [cell.rstrip(MARKS) for cell in cells]
        padded = [bare[0].ljust(widths[0])] + [
            text.rjust(width) for text, width in zip(bare[1:], widths[1:], strict=True)
        ]
        return " ".join(text + mark.ljust(1) for text, mark in zip(padded, marks, strict=True)).rstrip()

    task = results["manifest"]
    head = (
        f"{task.get('name', 'task')}: {task['n']} continuations, manifest {task['hash'][:12]}, seed {results['seed']}"
    )
    rule = "-" * len(line(headings))
    return "\n".join([head, line(headings), rule, *map(line, rows), rule, *footnotes])
