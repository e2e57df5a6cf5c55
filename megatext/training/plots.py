"""Curves of one or several runs from their metrics.jsonl."""

import re
from pathlib import Path
from typing import Any

from megatext.config import ConfigError

PANELS = {
    "loss": ["loss"],
    "held-out loss": ["validation/loss", "validation_ema/loss"],
    "throughput, tokens/s": ["tokens_per_second"],
    "gradient norm": ["grad_norm"],
    "learning rate": ["learning_rate"],
    "waiting for data, share": ["data_wait"],
    "memory, GiB": ["memory_gib"],
    "skipped steps": ["skipped_steps"],
    "KL, nats a token": ["loss/kl", "validation/loss/kl"],
    "accuracy": ["accuracy", "validation/accuracy"],
    "REPA cosine": ["repa_cosine", "validation/repa_cosine"],
    "latent variance a channel": ["latent_variance"],
    "latent mean a channel, absolute": ["latent_mean_abs"],
    "active units": ["active_units"],
    "directions that latents use": ["latent_rank"],
    "gate of the flow's gradient into the encoder": ["gate"],
}
"""Title -> keys of the records; the first is drawn solid, the second dashed, a panel without data is left out."""
BINS = {
    "loss by timestep": r"loss_t(\d)$",
    "decode accuracy by noise level, in training": r"accuracy_s(\d)$",
    "decode accuracy by noise level": r"accuracy_at_(\d\.\d)$",
}
"""Title -> keys whose number is the abscissa, drawn for each run's last record that has them."""
COLUMNS = 3
Records = list[dict[str, Any]]


def plot(runs: dict[str, Records], output: Path, smooth: float = 0.0) -> None:
    """Draw the panels that any run has data for, one colour a run, to a PNG. `smooth`: decay of a running mean over the
    records, 0 draws them as they are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [title for title, keys in PANELS.items() if any(_series(r, key) for r in runs.values() for key in keys)]
    binned = [title for title, pattern in BINS.items() if any(_latest(r, pattern) for r in runs.values())]
    count = len(panels) + len(binned)
    if not count:
        raise ConfigError(f"nothing to draw: {', '.join(runs)} recorded nothing yet")
    rows = -(-count // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(5 * COLUMNS, 3.2 * rows + 0.6), squeeze=False)
    spots = list(axes.flat)
    for spot in spots[count:]:
        spot.remove()
    for spot, title in zip(spots, panels, strict=False):
        keys = PANELS[title]
        for number, (name, records) in enumerate(runs.items()):
            for key, style in zip(keys, ("-", "--"), strict=False):
                points = _series(records, key)
                marker = "o" if len(points) < 20 else ""
                values = _running_mean([value for _, value in points], smooth)
                label = name if key == keys[0] or not _series(records, keys[0]) else None
                spot.plot([s for s, _ in points], values, style, color=f"C{number}", marker=marker, ms=3, label=label)
        spot.set(title=title + (f"  (dashed: {keys[1]})" if len(keys) > 1 else ""), xlabel="step")
        if title == "learning rate":
            spot.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for spot, title in zip(spots[len(panels) :], binned, strict=False):
        for number, records in enumerate(runs.values()):
            curve = _latest(records, BINS[title])
            spot.plot([x for x, _ in curve], [y for _, y in curve], "o-", color=f"C{number}", ms=3)
        spot.set(title=title, xlabel="timestep" if "timestep" in title else "noise level")
    for spot in spots[:count]:
        spot.grid(alpha=0.3)
        spot.title.set_fontsize(10)
    handles, labels = spots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=min(len(runs), 4), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / figure.get_figheight()))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def _series(records: Records, key: str) -> list[tuple[int, float]]:
    """(step, value) of the records that have the key; values that were not finite are left out."""
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def _latest(records: Records, pattern: str) -> list[tuple[float, float]]:
    """(abscissa, value) of the last record with keys of the pattern."""
    scale = 1.0 if "at_" in pattern else 0.1  # bins are numbered by tenths and drawn at their middle
    for record in reversed(records):
        found = [(re.match(pattern, key), value) for key, value in record.items()]
        points = [(float(m[1]) * scale + 0.5 * scale * (scale < 1), v) for m, v in found if m and v is not None]
        if points:
            return sorted(points)
    return []


def _running_mean(values: list[float], decay: float) -> list[float]:
    """Exponential, without the bias of its start."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(mean / weight)
    return out
