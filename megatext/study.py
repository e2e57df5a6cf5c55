"""A study: variants of training runs at equal budget, each with its seeds, in one table. Built as the commands that a
user would type.

A study's file names a corpus, a task, and runs; a run is a launcher, a configuration, and what it sets otherwise. A
value may name another run's model, `{lm}`: that run is trained first. What several studies share stands in a file that
they extend (`extends: FILE`). Whatever finished is not run again.
"""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from data_tools.sources import describe
from megatext.config import ConfigError, from_dict, read_yaml
from megatext.stages import Stage, share_of_threads


@dataclass(frozen=True)
class StudyRun:
    """One variant."""

    like: str = ""
    """Another run, whose fields are taken where this one does not say them, and whose `set` this one's is added to."""
    model_of: str = ""
    """Another run, whose models this one samples in further ways: nothing is trained."""
    launcher: Literal["", "lm", "vae", "dit", "cola", "ldlm"] = ""
    """launch/pretrain_*.py"""
    config: str = ""
    """Its configuration file."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys of the configuration, dotted, to values; `{RUN}` in a text is the directory of that run's model."""
    seeds: tuple[int, ...] = ()
    """One training run each. A seed stands on the same seed of the runs that it names, or on their first."""
    states: str = ""
    """A run, a language model, whose hidden states are extracted for this one (`data.hidden_states`)."""
    states_layer: int | None = None
    """Their layer; null: that in the options of extract_hidden_states."""
    name: str = ""
    """Its rows in the table; empty: the run's own name."""
    sampling: tuple[dict[str, Any], ...] = ()
    """Ways to sample it, a row each; empty: not in the table."""
    unconditional: int = 0
    """Passages to write without a prefix, in the first way; scored by nll, entropy and distinct-2 only."""


@dataclass(frozen=True)
class StudyConfig:
    """A file of launch/configs/studies."""

    work_dir: str
    """Everything the study writes is in here."""
    corpus: str
    """Input of data_tools.shard."""
    task: dict[str, Any]
    """Of the evaluation; its source is the shards' test split."""
    runs: dict[str, StudyRun]
    """By name, those that others name first."""
    judge: str
    """Causal LM that scores, and whose features MAUVE and BERTScore take; `{RUN}` is a run's model."""
    options: dict[str, str] = field(default_factory=dict)
    """Further options, as typed, of train_tokenizer, shard and extract_hidden_states."""
    set: dict[str, Any] = field(default_factory=dict)
    """Keys that every run sets, where it does not say otherwise."""


class Study:
    """The stages of a study. Raises ConfigError where its file does not fit together."""

    def __init__(
        self,
        file: Path,
        *,
        corpus: str | None = None,
        judge: str | None = None,
        only: Sequence[str] = (),
        seeds: int | None = None,
        jobs: int = 1,
    ) -> None:
        """`corpus` and `judge` replace the file's; `only` these runs, and those that they stand on; the first `seeds`
        of each; `jobs` run at a time, and share the machine's cores."""
        content = read_yaml(file)
        if "extends" in content:
            content = _extended(read_yaml(Path(content.pop("extends"))), content)
        config = from_dict(StudyConfig, content, where=str(file))
        self._said = {name: set(fields) for name, fields in content["runs"].items()}
        self.config = replace(config, corpus=corpus or config.corpus, judge=judge or config.judge)
        self.work_dir, self.file, self.jobs = Path(config.work_dir), file, jobs
        self.table = self.work_dir / "table"
        self.runs = {name: self._whole(name) for name in config.runs}
        for name in only:
            self._known(name, "--only")
        if seeds is not None and seeds < 1:
            raise ConfigError(f"--seeds {seeds}: at least 1")
        self.seeds = seeds
        # what is not in the table is trained where something stands on it
        self.chosen = [name for name, run in self.runs.items() if (name in only if only else run.sampling)]
        self.stages: list[Stage] = []
        self.files: dict[Path, str] = {}
        self._build()

    def write_files(self) -> None:
        """Write what the commands read: the task, and the rows of the table."""
        for path, text in self.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_text() != text:
                path.write_text(text)

    def _known(self, name: str, where: str) -> None:
        if name not in self.config.runs:
            raise ConfigError(
                f"{self.file}: {where}: no run is called {name}; known here: {', '.join(self.config.runs)}"
            )

    def _whole(self, name: str) -> StudyRun:
        """A run with what it has from those it is like. All that it names has to stand before it."""
        run, before = self.config.runs[name], list(self.config.runs)[: list(self.config.runs).index(name)]
        for other in [run.like, run.model_of, run.states, *named_in(run.set)]:
            if other:
                self._known(other, f"runs.{name}")
                if other not in before:
                    raise ConfigError(f"{self.file}: runs.{name} names {other}, which has to stand before it")
                if other != run.model_of and self.config.runs[other].model_of:
                    raise ConfigError(f"{self.file}: runs.{name} names {other}, which samples another run's models")
        if run.like:
            base = asdict(self._whole(run.like))
            own = {key: value for key, value in asdict(run).items() if key in self._said[name]}
            run = StudyRun(**{**base, **own, "name": run.name or name, "set": {**base["set"], **run.set}, "like": ""})
        if run.model_of:
            return self._resampled(name, run)
        if not (run.launcher and run.config and run.seeds):
            raise ConfigError(f"{self.file}: runs.{name}: launcher, config and seeds are needed")
        if run.states_layer is not None and not run.states:
            raise ConfigError(f"{self.file}: runs.{name}: states_layer is of states, which are not said")
        return replace(run, name=run.name or name)

    def _resampled(self, name: str, run: StudyRun) -> StudyRun:
        """A run that samples the models of another."""
        trained = self._whole(run.model_of)
        seeds = run.seeds or trained.seeds
        own = run.launcher or run.config or run.set or run.states or run.states_layer is not None
        if trained.model_of or own or not run.sampling:
            raise ConfigError(
                f"{self.file}: runs.{name}: model_of names a run that is trained, and goes with sampling, "
                "name, seeds and unconditional only"
            )
        if not set(seeds) <= set(trained.seeds):
            raise ConfigError(f"{self.file}: runs.{name}: {run.model_of} has the seeds {list(trained.seeds)} only")
        again = replace(trained, model_of=run.model_of, name=run.name or name, seeds=seeds)
        return replace(again, sampling=run.sampling, unconditional=run.unconditional)

    def model(self, name: str, seed: int) -> Path:
        """Where a run's model of a seed is; of its first one, if it has not this one."""
        self._known(name, "{" + name + "}")
        name = self.runs[name].model_of or name
        return self.work_dir / "models" / f"{name}-{self._seed(name, seed)}"

    def _seed(self, name: str, seed: int) -> int:
        seeds = self.runs[name].seeds
        return seed if seed in seeds else seeds[0]

    def _fill(self, value: Any, seed: int) -> Any:
        if isinstance(value, str):
            return re.sub(r"\{(\w+)\}", lambda found: str(self.model(found[1], seed)), value)
        return value

    def _named(self, name: str) -> set[str]:
        """The runs that a run names."""
        run = self.runs[name]
        return {run.model_of} if run.model_of else named_in(run.set) | ({run.states} if run.states else set())

    def _build(self) -> None:
        corpus, options = shlex.quote(self.config.corpus), self.config.options
        facts = tuple(json.dumps(entry) for entry in describe([self.config.corpus]))
        tokenizer, shards = self.work_dir / "tokenizer", self.work_dir / "shards"
        make = f"python -m data_tools.train_tokenizer --input {corpus} --output {tokenizer}"
        self._add(
            "tokenizer", f"{make} {options.get('train_tokenizer', '')}", writes=[tokenizer], facts=facts, root=True
        )
        shard = f"python -m data_tools.shard --input {corpus} --tokenizer {tokenizer} --output {shards}"
        self._add("shard", f"{shard} {options.get('shard', '')}", writes=[shards], facts=facts, root=True)
        task = self.work_dir / "task.yaml"
        self.files[task] = json.dumps(
            {"name": self.work_dir.name, "source": f"shards:{shards}:test", **self.config.task}
        )
        self._add("manifest", f"python -m evaluation manifest --task {task} --output {self.table}",
                  writes=[self.table / "manifest.jsonl"], needs=["shard"], reads=[task])  # fmt: skip
        rows: list[dict[str, Any]] = []
        for judge in named_in({"judge": self.config.judge}):
            self._known(judge, "judge")
            self._train(judge, 0)
        for name, seed in self._pairs():
            self._train(name, seed)
            if self.runs[name].sampling:
                rows += self._write(name, seed)
        self._score(rows)

    def _pairs(self) -> list[tuple[str, int]]:
        """The runs that are asked for with their seeds, seed by seed: what is there when a study is cut short can be
        compared."""
        pairs = []
        for name in self.chosen:
            trained = self.runs[self.runs[name].model_of or name].seeds
            places = ((trained.index(seed), seed) for seed in self.runs[name].seeds)
            pairs += [(place, name, seed) for place, seed in places if self.seeds is None or place < self.seeds]
        return [(name, seed) for _, name, seed in sorted(pairs, key=lambda pair: pair[0])]

    def _train(self, name: str, seed: int) -> None:
        """The stages of a run's model of a seed, after those of all that it stands on; each once."""
        name = self.runs[name].model_of or name
        seed = self._seed(name, seed)
        if f"pretrain_{name}-{seed}" in {stage.name for stage in self.stages}:
            return
        for other in self.runs:
            if other in self._named(name):
                self._train(other, seed)
        run, model, run_dir = self.runs[name], self.model(name, seed), self.work_dir / "runs" / f"{name}-{seed}"
        settings = {"data.shards": str(self.work_dir / "shards"), **self.config.set, **run.set}
        if run.states:
            settings["data.hidden_states"] = str(self._states(run.states, run.states_layer, seed))
        keys = [
            f"--{key} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}"
            for key, value in ((key, self._fill(value, seed)) for key, value in settings.items())
        ]
        launch = f"deepspeed --quiet --num_gpus 1 launch/pretrain_{run.launcher}.py --config {run.config}"
        command = f"{launch} --run_dir {run_dir} --seed {seed} {' '.join(keys)}"
        self._add(f"pretrain_{name}-{seed}", command, writes=[run_dir], reads=[Path(run.config)], continues=True)
        export = f"python launch/export.py --run {run_dir} --output {model}"
        self._add(f"export_{name}-{seed}", export, writes=[model])

    def _states(self, name: str, layer: int | None, seed: int) -> Path:
        model, shards = self.model(name, seed), self.work_dir / "shards"
        states = self.work_dir / "states" / (model.name if layer is None else f"{model.name}_layer{layer}")
        if f"states_{states.name}" not in {stage.name for stage in self.stages}:
            extract = f"python -m data_tools.extract_hidden_states --shards {shards} --model {model} --output {states}"
            options = self.config.options.get("extract_hidden_states", "")
            options += "" if layer is None else f" --layer {layer}"  # the last of two counts
            self._add(f"states_{states.name}", f"{extract} {options}", writes=[states])
        return states

    def _write(self, name: str, seed: int) -> list[dict[str, Any]]:
        """A stage that writes the texts of a run's rows to the evaluation's cache; the rows."""
        run, model, systems = self.runs[name], self.model(name, seed), self.work_dir / "systems" / f"{name}-{seed}.yaml"
        kind = "hf" if run.launcher == "lm" else "model"
        rows = [
            {
                "name": " ".join([run.name, *(f"{key}={value}" for key, value in way.items()), f"seed={seed}"]),
                "system": f"{kind}:{model}",
                "sampling": way,
                "group": run.name,
                "unconditional": run.unconditional if way == run.sampling[0] else 0,
            }
            for way in run.sampling
        ]
        self.files[systems] = json.dumps(rows, indent=1)
        command = (
            f"python -m evaluation generate --systems {systems} --output {self.table} --cache {self.table / 'cache'}"
        )
        needs = ["manifest", f"export_{run.model_of or name}-{seed}"]
        self._add(f"write_{name}-{seed}", command, needs=needs, reads=[systems], continues=True)
        return rows

    def _score(self, rows: list[dict[str, Any]]) -> None:
        sanity = [{"name": "other document", "system": "other"}, {"name": "repeated prefix", "system": "repeat"}]
        systems = self.work_dir / "systems.yaml"
        self.files[systems] = json.dumps([*sanity, *rows], indent=1)
        judge = self._fill(self.config.judge, 0)
        models = f"--judge {judge} --featuriser {judge} --bertscore-model {judge}"
        generate = f"python -m evaluation generate --systems {systems} --judge {judge} --output {self.table}"
        needs = [stage.name for stage in self.stages if stage.name.startswith("write_")]
        self._add("generate", generate, writes=[self.table / "generations.json"], needs=needs, reads=[systems])
        self._add("score", f"python -m evaluation score {models} --output {self.table}",
                  writes=[self.table / "results.json"], needs=["generate"], continues=True)  # fmt: skip
        runs = [str(stage.writes[0]) for stage in self.stages if stage.name.startswith("pretrain_")]
        self._add("report", f"python -m evaluation report --output {self.table} --runs {' '.join(runs)}",
                  writes=[self.table / "report.html"], needs=["score"])  # fmt: skip

    def _add(
        self,
        name: str,
        command: str,
        *,
        writes: Sequence[Path] = (),
        needs: Sequence[str] = (),
        reads: Sequence[Path] = (),
        continues: bool = False,
        facts: tuple[str, ...] = (),
        root: bool = False,
    ) -> None:
        """A stage, after those whose outputs its command names."""
        words = tuple(shlex.split(command))
        made = {str(path): stage.name for stage in self.stages for path in stage.writes}
        found = [made[word] for word in words if word in made]
        all_needs = tuple(dict.fromkeys([*needs, *found]))
        environment = share_of_threads(self.jobs)
        self.stages.append(
            Stage(name, words, tuple(reads), facts, tuple(writes), all_needs, continues, root, environment, 60.0)
        )


def _extended(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A study's content on that of a file which several share: runs come after its own, fields of a run that both have
    and other keys instead of its own."""
    shared, added = common.get("runs", {}), own.get("runs", {})
    return {
        **common,
        **own,
        "runs": {name: {**shared.get(name, {}), **added.get(name, {})} for name in {**shared, **added}},
    }


def named_in(settings: dict[str, Any]) -> set[str]:
    """The runs that values name."""
    return {name for value in settings.values() if isinstance(value, str) for name in re.findall(r"\{(\w+)\}", value)}
