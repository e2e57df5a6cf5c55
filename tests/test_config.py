"""Configuration: what is read, and what is said about what cannot be read."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatext.config import ConfigError, cli_errors, from_dict, load_config, save_yaml, to_dict
from megatext.config_help import usage
from megatext.data import DataError
from megatext.recipes import config_class


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    name: Literal["adamw", "muon"] = "adamw"
    decay: float | None = None
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    run_dir: str
    steps: int = 10
    compile: bool = False
    inner: Inner = field(default_factory=Inner)
    extra: Inner | None = None


def load(tmp_path: Path, text: str, *argv: str) -> Outer:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(Outer, ["--config", str(path), *argv])[0]


def test_yaml_and_overrides(tmp_path: Path) -> None:
    text = "run_dir: runs/x\ninner: {rate: 1e-4, betas: [1, 0.5]}\n"
    config = load(
        tmp_path, text, "--inner.rate", "3e-4", "--inner.sizes=[1, 2]", "--extra.name", "muon", "--compile=true"
    )
    assert config == Outer(
        run_dir="runs/x",
        compile=True,
        inner=Inner(rate=3e-4, betas=(1.0, 0.5), sizes=(1, 2)),
        extra=Inner(name="muon"),
    )


def test_flags(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: x")
    argv = ["--local_rank=0", "--config", str(path), "--dry_run", "--deepspeed_config", "z.json"]
    _, flags = load_config(Outer, argv)
    assert flags.dry_run and flags.config == path and flags.deepspeed_config == Path("z.json")


def test_interpolation(tmp_path: Path) -> None:
    config = load(tmp_path, "run_dir: ${oc.env:HOME}/x\nsteps: 7\ninner:\n  decay: ${steps}\n")
    assert config.inner.decay == 7.0
    assert "$" not in config.run_dir


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("run_dir: x\nstep: 3", [], "c.yaml: unknown key 'step'; did you mean 'steps'"),
        ("run_dir: x\ninner: {ratte: 3}", [], "c.yaml: unknown key 'inner.ratte'; did you mean 'inner.rate'"),
        ("run_dir: x", ["--inner.nam", "muon"], "--inner.nam: unknown key 'inner.nam'; did you mean 'inner.name'"),
        ("run_dir: x", ["--dryrun", "1"], "did you mean 'dry_run'"),
        ("steps: 3", [], "key 'run_dir' is missing"),
        ("run_dir: x", ["--steps", "3.5"], "key 'steps' is 3.5, which is not a int"),
        ("run_dir: x", ["--inner.rate", "fast"], "key 'inner.rate' is 'fast', which is not a float"),
        (
            "run_dir: x",
            ["--inner.name", "sgd"],
            r"key 'inner.name' is 'sgd', which is not a Literal\['adamw', 'muon'\]",
        ),
        ("run_dir: x", ["--inner.betas", "[1]"], "key 'inner.betas'"),
        ("run_dir: x", ["--inner", "3"], "key 'inner' is 3"),
        ("run_dir: x", ["--steps"], "--steps: a value is missing"),
        ("run_dir: x", ["steps"], "expected an option"),
        ("run_dir: [", [], "c.yaml: not a readable YAML file"),
        ("- 1", [], "expected keys and values"),
        ("run_dir: ${nowhere}", [], "c.yaml: Interpolation key 'nowhere' not found"),
    ],
)
def test_errors_name_place_and_remedy(tmp_path: Path, text: str, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text, *argv)
    assert "\n" not in str(caught.value)


def test_missing_file_and_option() -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml: no such file"):
        load_config(Outer, ["--config", "nowhere.yaml"])
    with pytest.raises(ConfigError, match="--config FILE is required"):
        load_config(Outer, [])


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(),
    st.lists(st.integers(), max_size=3),
    st.text(max_size=20),
)
def test_round_trip(rate: float, steps: int, sizes: list[int], name: str) -> None:
    config = Outer(run_dir=name, steps=steps, inner=Inner(rate=rate, sizes=tuple(sizes)), extra=Inner())
    assert from_dict(Outer, to_dict(config), "here") == config


def test_saved_yaml_can_be_loaded(tmp_path: Path) -> None:
    config = Outer(run_dir="x", inner=Inner(rate=1e-5, sizes=(3,)), extra=Inner(decay=0.5))
    save_yaml(config, tmp_path / "saved.yaml")
    assert load_config(Outer, ["--config", str(tmp_path / "saved.yaml")])[0] == config


def test_an_empty_override_is_an_empty_string(tmp_path: Path) -> None:
    save_yaml(Outer(run_dir="x", extra=Inner()), tmp_path / "saved.yaml")
    arguments = ["--config", str(tmp_path / "saved.yaml"), "--run_dir", "", "--extra", "null"]
    config = load_config(Outer, arguments)[0]
    assert config.run_dir == "" and config.extra is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("bad key"), "bad key"),
        (DataError("bad shard"), "bad shard"),
        (OSError(28, "No space left on device", "runs/x"), "runs/x: No space left on device"),
    ],
)
def test_programs_end_in_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, cli_errors():
        raise error
    assert caught.value.code == 1
    assert capsys.readouterr().err == f"error: {line}\n"


def keys_of(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a configuration to its default, by the dataclasses alone."""
    found: dict[str, Any] = {}
    for key in dataclasses.fields(cls):
        hint = get_type_hints(cls)[key.name]
        if dataclasses.is_dataclass(hint):
            if key.default_factory is not dataclasses.MISSING:
                assert key.default_factory() == hint(), (
                    f"{prefix}{key.name}: said in part it has other defaults than whole"
                )
            found |= keys_of(hint, f"{prefix}{key.name}.")  # type: ignore[arg-type]
        elif key.init:
            default = key.default if key.default_factory is dataclasses.MISSING else key.default_factory()
            found[prefix + key.name] = default
    return found


@pytest.mark.parametrize("recipe", ["LM", "VAE", "DiT", "Cola", "LDLM"])
def test_help_tells_every_key_its_default_and_its_text(recipe: str) -> None:
    cls = config_class(f"Pretrain{recipe}Config")
    text = usage("pretrain_x.py", cls)
    lines = text.splitlines()
    for key, default in keys_of(cls).items():
        if key == "data.more_sources":  # of several sections, told below it
            continue
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"  --{key} ")]
        shown = lines[at].rpartition(", " if not isinstance(default, tuple) else ", [")[2].strip("]")
        if default is dataclasses.MISSING:
            assert shown == "needed"
        elif isinstance(default, tuple):
            assert shown == ", ".join(map(str, default))
        else:
            assert yaml.safe_load(shown) == default or float(shown) == default
        assert lines[at + 1].startswith("      ") and lines[at + 1].strip()
    assert "  data.more_sources[].shards str, needed" in lines
    assert "  --training.precision auto|bf16|fp32, auto" in lines


def test_a_launcher_tells_its_help() -> None:
    root = Path(__file__).resolve().parent.parent
    found = subprocess.run(
        [sys.executable, root / "launch/pretrain_dit.py", "--help"], capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("usage: deepspeed launch/pretrain_dit.py --config FILE")
    assert (
        "  --dit.flow.objective velocity|x0|token_cross_entropy, velocity\n      What the network predicts"
        in found.stdout
    )
