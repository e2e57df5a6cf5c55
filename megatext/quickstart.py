"""The stages from raw text to scored samples, as the commands a user would type, built from a preset folder.

A preset folder holds `stages.yaml` (QuickstartConfig), a configuration for every training run, `evaluation.yaml`
(the task) and `systems.yaml` (the rows of the table). The configurations are used as they are, so each command can
be repeated by hand; a recipe other than the default has its own `dit_RECIPE.yaml` and `systems_RECIPE.yaml`.
"""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_tools.sources import describe
from megatext.config import ConfigError, from_dict
from megatext.stages import Stage, share_of_threads

RECIPES = ("default", "textldm_paper", "cola", "ldlm")
RUNS = {
    "lm": "lm",
    "vae": "vae",
    "token_vae": "vae",
    "dit": "dit",
    "dit_textldm_paper": "dit",
    "vae_cola": "vae",
    "dit_cola": "cola",
    "dit_ldlm": "ldlm",
}
"""Training run, which is also the name of its configuration -> launch/pretrain_*.py."""


@dataclass(frozen=True)
class QuickstartConfig:
    """`stages.yaml` of a preset."""

    work_dir: str
    """Everything the quickstart writes is in here."""
    corpus: str = "pydocs:"
    """Input of data_tools.shard."""
    options: dict[str, str] = field(default_factory=dict)
    """Further options, as typed, of train_tokenizer, shard and extract_hidden_states (which have no configuration)."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long a stage is expected to take, by its name: what the time left is told from."""


class Quickstart:
    """The stages of one preset and recipe. Reads the preset's files, looks at the corpus's, and runs nothing; raises
    ConfigError, and DataError for a corpus that is not there."""

    def __init__(
        self,
        configs: Path,
        *,
        recipe: str = "default",
        num_processes: int = 1,
        corpus: str | None = None,
        teacher: str | None = None,
    ) -> None:
        """`corpus` replaces the preset's input. `teacher` (a Hugging Face causal LM) replaces the AR baseline as
        REPA teacher; the shards then have its tokenizer."""
        self.configs, self.recipe, self.num_processes = configs, recipe, num_processes
        self.preset = from_dict(QuickstartConfig, self._read("stages"), where=str(configs / "stages.yaml"))
        self.work_dir = Path(self.preset.work_dir)
        self.results = self.work_dir if recipe == "default" else self.work_dir / recipe
        self.stages: list[Stage] = []
        self._data(corpus or self.preset.corpus, teacher)
        dit, runs = self._training(teacher)
        self._evaluation(dit, runs)
        stages = {f"{verb}_{run}" for verb in ("pretrain", "export") for run in RUNS}
        stages |= {
            "train_tokenizer",
            "extract_hidden_states",
            *(self.name_in_preset(stage.name) for stage in self.stages),
        }
        for key, given, known in [
            ("options", set(self.preset.options), {"train_tokenizer", "shard", "extract_hidden_states"}),
            ("seconds", set(self.preset.seconds), stages),
        ]:
            if unknown := sorted(given - known):
                what = f"no stage is called {', '.join(unknown)}; known here: {', '.join(sorted(known))}"
                raise ConfigError(f"{configs}/stages.yaml: {key}: {what}")

    def _data(self, corpus: str, teacher: str | None) -> None:
        tokenizer, shards = self.work_dir / "tokenizer", self.work_dir / "shards"
        source, options = f"--input {shlex.quote(corpus)}", self.preset.options
        files = tuple(json.dumps(entry) for entry in describe([corpus]))
        if teacher is None:
            make = f"python -m data_tools.train_tokenizer {source} --output {tokenizer}"
            command = f"{make} {options.get('train_tokenizer', '')}"
            self._add("train_tokenizer", command, writes=[tokenizer], facts=files, root=True)
        self._add(
            "shard",
            f"python -m data_tools.shard {source} --tokenizer {teacher or tokenizer} --output {shards}"
            f" {options.get('shard', '')}",
            writes=[shards],
            needs=[] if teacher else ["train_tokenizer"],
            facts=files,
            root=True,
        )

    def _training(self, teacher: str | None) -> tuple[str, list[str]]:
        """Name of the denoiser's run, and the directories of all runs."""
        self._train("lm", needs=["shard"])
        if self.recipe == "ldlm":
            if teacher:
                raise ConfigError("--teacher: LDLM here reads the baseline's states; docs/ldlm.md has other models'")
            self._train("dit_ldlm", needs=["shard", self._export_of("language_model", ["lm"], "dit_ldlm")])
            return "dit_ldlm", [self._read(run)["run_dir"] for run in ("lm", "dit_ldlm")]
        if self.recipe == "cola":  # no teacher
            self._train("vae_cola", needs=["shard"])
            return self._denoiser("dit_cola", ["vae_cola"])
        states = self.work_dir / "hidden_states"
        extract = (
            f"python -m data_tools.extract_hidden_states --shards {self.work_dir / 'shards'}"
            f" --model {teacher or self._model('lm')} --layer -3"
            f" --max-tokens {self._read('vae')['data']['max_tokens']} --output {states}"
            f" {self.preset.options.get('extract_hidden_states', '')}"
        )
        self._add("extract_hidden_states", extract, writes=[states], needs=["shard"] if teacher else ["export_lm"])
        self._train("vae", needs=["extract_hidden_states"])
        vaes, dit = ["vae"], f"dit_{self.recipe}"
        if self.recipe == "default":
            self._train("token_vae", needs=["shard"])
            vaes, dit = ["vae", "token_vae"], "dit"
        return self._denoiser(dit, vaes)

    def _denoiser(self, dit: str, vaes: list[str]) -> tuple[str, list[str]]:
        """Train the denoiser on one of `vaes`; its run's name, and the directories of all runs."""
        needs = ["shard", self._export_of("vae", vaes, dit)]
        if self._read(dit)[RUNS[dit]].get("warm_start"):
            needs.append(self._export_of("warm_start", ["lm"], dit))
        self._train(dit, needs=needs)
        return dit, [self._read(run)["run_dir"] for run in ["lm", *vaes, dit]]

    def _export_of(self, key: str, runs: list[str], dit: str) -> str:
        """The stage that exports the model which `dit` names under `key`; it has to be one of `runs`."""
        directory = self._read(dit)[RUNS[dit]][key]
        for run in runs:
            if self._model(run) == Path(directory):
                return f"export_{run}"
        trained = ", ".join(str(self._model(run)) for run in runs)
        raise ConfigError(f"{self.configs}/{dit}.yaml: {RUNS[dit]}.{key} is {directory}, but trained here is {trained}")

    def _train(self, run: str, needs: list[str]) -> None:
        config, ranks = self.configs / f"{run}.yaml", self.num_processes
        settings, model = self._read(run), self._model(run)
        run_dir, rows = settings["run_dir"], settings["training"]["rows_per_step"]
        if ranks < 1 or rows % ranks:
            raise ConfigError(
                f"--num_processes {ranks}: the {rows} rows of a step of {config} do not divide among them"
            )
        several = f" --deepspeed_config ds_configs/zero3.json --training.micro_batch_rows {rows // ranks}"
        self._add(
            f"pretrain_{run}",
            f"deepspeed --quiet --num_gpus {ranks} launch/pretrain_{RUNS[run]}.py --config {config}"
            + (several if ranks > 1 else ""),
            writes=[Path(run_dir)],
            needs=needs,
            reads=[config],
            continues=True,
            environment=share_of_threads(ranks),
        )
        self._add(
            f"export_{run}",
            f"python launch/export.py --run {run_dir} --output {model}",
            writes=[model],
            needs=[f"pretrain_{run}"],
        )

    def _evaluation(self, dit: str, runs: list[str]) -> None:
        task = self.configs / "evaluation.yaml"
        systems = self.configs / ("systems.yaml" if self.recipe == "default" else f"systems_{self.recipe}.yaml")
        lm, output = self._model("lm"), f"--output {self.results}"
        judge, readers = f"--judge {lm}", f"--featuriser {lm} --bertscore-model {lm}"
        self._add(
            self._of_recipe("manifest"),
            f"python -m evaluation manifest --task {task} {output}",
            writes=[self.results / "manifest.jsonl"],
            needs=["shard"],
            reads=[task],
        )
        self._add(
            self._of_recipe("generate"),
            f"python -m evaluation generate --systems {systems} {judge} {output}",
            writes=[self.results / "generations.json"],
            needs=[self._of_recipe("manifest"), "export_lm", f"export_{dit}"],
            reads=[systems],
            continues=True,
        )
        self._add(
            self._of_recipe("score"),
            f"python -m evaluation score {judge} {readers} {output}",
            writes=[self.results / "results.json"],
            needs=[self._of_recipe("generate")],
            continues=True,
        )
        self._add(
            self._of_recipe("report"),
            f"python -m evaluation report {output} --runs {' '.join(runs)}",
            writes=[self.results / "report.html"],
            needs=[
                self._of_recipe("score"),
                *(f"pretrain_{run}" for run in RUNS if f"pretrain_{run}" in {s.name for s in self.stages}),
            ],
        )

    def _add(
        self,
        name: str,
        command: str,
        writes: list[Path],
        needs: list[str] | None = None,
        reads: list[Path] | None = None,
        continues: bool = False,
        environment: tuple[tuple[str, str], ...] = (),
        facts: tuple[str, ...] = (),
        root: bool = False,
    ) -> None:
        self.stages.append(
            Stage(
                name,
                command=tuple(shlex.split(command)),
                reads=tuple(reads or ()),
                facts=facts,
                root=root,
                writes=tuple(writes),
                needs=tuple(needs or ()),
                continues=continues,
                environment=environment,
                expected_seconds=self.preset.seconds.get(self.name_in_preset(name), 30.0),
            )
        )

    def _of_recipe(self, name: str) -> str:
        """The stages of a recipe's evaluation have its name: finished ones are not run again for another recipe."""
        return name if self.recipe == "default" else f"{name}_{self.recipe}"

    def name_in_preset(self, name: str) -> str:
        """What `seconds` calls a stage."""
        return name if name.startswith(("pretrain_", "export_")) else name.removesuffix(f"_{self.recipe}")

    def _model(self, run: str) -> Path:
        """Where a run's model is exported to."""
        return self.work_dir / "models" / run

    def _read(self, name: str) -> dict[str, Any]:
        path = self.configs / f"{name}.yaml"
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; the folders of launch/configs show what a preset holds")
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)  # type: ignore[return-value]
