"""Cola DLM's format: what its released code computes with the same weights, and directories that go both ways."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatext.config import ConfigError
from megatext.generation import SamplingConfig, TextGenerator, blockwise
from megatext.generation.noise import Request
from megatext.nn.attention import make_mask
from megatext.nn.dit import TextDiT
from megatext.nn.layout import CONTEXT, TARGET, Layout
from megatext.nn.text_vae import TextVAE
from megatext.recipes import cola_format
from megatext.recipes.pretrained import load_text_vae, write_model, write_vae
from megatext.recipes.text_dit import TextDiTRecipeConfig
from tests.recipes import cola_golden
from tests.recipes.cola_golden import LENGTHS, PROMPTS, SIZES

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=SIZES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def golden(case: str) -> dict[str, np.ndarray]:
    arrays = np.load(cola_golden.FILE)
    return {name.removeprefix(f"{case}/"): arrays[name] for name in arrays.files if name.startswith(f"{case}/")}


@pytest.fixture
def directory(case: str, golden: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """The case's random weights, as the release lays them out; no tokenizer."""
    return write_release(tmp_path / "release", case, golden)


def write_release(directory: Path, case: str, golden: dict[str, np.ndarray], **changes: Any) -> Path:
    for name, config in (("vae", cola_golden.vae_config(case)), ("dit", cola_golden.dit_config(case))):
        folder = directory / f"cola_{name}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config | changes.get(name, {})))
        save_file(cola_golden.weights(json.loads(str(golden[f"{name}_shapes"]))), folder / "model.safetensors")
    return directory


def texts() -> tuple[Tensor, Layout, Tensor]:
    """The golden texts as padded rows: ids, layout, and where in the rows the real tokens are."""
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for i, length in enumerate(LENGTHS):
        ids[i, :length] = torch.tensor(cola_golden.tokens(f"text {i}", length))
    position = torch.arange(max(LENGTHS)).expand_as(ids)
    real = position < torch.tensor(LENGTHS)[:, None]
    return ids, Layout.of(torch.where(real, 0, -1), position), real


def in_rows(flat: Tensor, real: Tensor) -> Tensor:
    """`[sum of LENGTHS, ...]` as padded rows."""
    rows = torch.zeros(*real.shape, *flat.shape[1:])
    rows[real] = flat
    return rows


def assert_close(ours: Tensor, theirs: np.ndarray) -> None:
    """To `TOLERANCE` of the largest value."""
    wanted = torch.from_numpy(theirs)
    assert ours.shape == wanted.shape and float((ours - wanted).abs().max() / wanted.abs().max()) < TOLERANCE


@torch.no_grad()
def test_encoder_and_decoder(directory: Path, golden: dict[str, np.ndarray]) -> None:
    vae, (ids, layout, real) = cola_format.read_vae(directory), texts()
    layout = vae.layout(layout.segment, layout.position)
    mean, log_variance, _ = vae.encode(ids, layout)
    assert_close(mean[real], golden["mean"])
    assert_close(log_variance[real], golden["log_variance"])
    latents = in_rows(torch.from_numpy(golden["mean"]), real)
    assert_close(vae.decode(latents, layout)[real], golden["logits"])


@torch.no_grad()
def test_decoder_after_a_cache(directory: Path, case: str, golden: dict[str, np.ndarray]) -> None:
    vae, (_, layout, real) = cola_format.read_vae(directory), texts()
    size = SIZES[case]["block"]
    latents = in_rows(torch.from_numpy(golden["mean"]), real)
    logits = []
    for row, length in enumerate(LENGTHS):
        own, before = slice(length - size, length), slice(0, length - size)
        layouts = [
            vae.layout(layout.segment[row, None, part], layout.position[row, None, part]) for part in (before, own)
        ]
        rule = vae.config.attention
        _, past = vae.decode_after(latents[row, None, before], layouts[0].position, make_mask(rule, layouts[0]))
        mask = make_mask(rule, layouts[1], Layout.concatenate(layouts))
        hidden, _ = vae.decode_after(latents[row, None, own], layouts[1].position, mask, past)
        logits.append(vae.unembedding(hidden)[0])
    assert_close(torch.cat(logits), golden["logits_cached"])


@torch.no_grad()
def test_velocities(directory: Path, case: str, golden: dict[str, np.ndarray]) -> None:
    """Of whole texts under their block-causal mask, of a block after a cache, of a noisy copy beside a clean one."""
    network, _ = cola_format.read_dit(directory)
    ids, layout, real = texts()
    size, everywhere = SIZES[case]["block"], torch.ones_like(real)
    noisy = in_rows(torch.from_numpy(cola_golden.random("noisy", (sum(LENGTHS), cola_golden.CHANNELS))), real)
    clean = in_rows(torch.from_numpy(golden["mean"]), real)
    t = torch.cat((torch.zeros(1), cola_golden.timesteps()))
    index = in_rows(torch.arange(1.0, len(t)), real).long()
    blocks = Layout.of(layout.segment, layout.position, block_tokens=size)
    out, _ = network(noisy, t, index, blocks.position, everywhere, make_mask("block_causal", blocks))
    assert_close(out[real], golden["velocity"])
    both = Layout.concatenate([blocks, blocks.with_role(TARGET)])
    out, _ = network(
        torch.cat((clean, noisy), dim=1),
        t,
        torch.cat((torch.zeros_like(index), index), dim=1),
        both.position,
        both.role != CONTEXT,
        make_mask("two_stream", both),
    )
    two_streams = out[:, max(LENGTHS) :]
    assert_close(two_streams[0], golden["velocity_two_streams"])
    last = torch.cat([two_streams[row, length - size : length] for row, length in enumerate(LENGTHS)])
    assert_close(last, golden["velocity_cached"])


class GoldenNoise:
    """The noise that the golden texts were written from."""

    def __init__(self, requests: list[Request], blocks: list[int], spans: list[tuple[int, int]], device: Any) -> None:
        self.requests, self.blocks, self.size = requests, blocks, spans[0][1]

    def normal(self, channels: int) -> Tensor:
        which = []
        for request, start in zip(self.requests, self.blocks, strict=True):
            block = (start - len(request.prompt) // self.size * self.size) // self.size
            which.append(cola_golden.random(f"noise {request.seed} {block}", (self.size, channels)))
        return torch.from_numpy(np.stack(which))


class NoText:
    """A tokenizer of which only the end of text is asked, which is never written."""

    eos_id = -1
    end_ids = (-1,)


@pytest.mark.parametrize("history", ["latents", "tokens"])
def test_texts(
    history: str, directory: Path, case: str, golden: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their engine writes prompts one by one; here all are one batch. History as tokens is another model of the text,
    so it is not what they write."""
    # where their encoder looks ahead, it sees the padding of the block in which a prompt ends; ours does not
    same = [i for i, n in enumerate(PROMPTS) if n % SIZES[case]["vae_block"] == 0]
    network, flow = cola_format.read_dit(directory)
    monkeypatch.setattr(blockwise, "Noise", GoldenNoise)
    from megatext.flow.paths import Linear
    from megatext.recipes.denoiser import TextDiTTraining

    module = TextDiTTraining(network, flow, Linear(), None)
    generator = TextGenerator(module, cola_format.read_vae(directory), NoText(), SamplingConfig())  # type: ignore[arg-type]
    size = SIZES[case]["block"]
    # they write whole blocks, as many as hold the tokens asked for
    blocks = -(-cola_golden.NEW_TOKENS // size)
    requests = [
        Request(cola_golden.tokens(f"prompt {i}", n), n // size * size + blocks * size - n, i)
        for i, n in enumerate(PROMPTS)
    ]
    sampling = SamplingConfig(
        steps=cola_golden.STEPS,
        grid="uniform",
        guidance_scale=cola_golden.GUIDANCE,
        history=history,  # type: ignore[arg-type]
        length="eos",
    )
    written: list[list[int]] = [[] for _ in requests]
    for pieces in generator._pieces(requests, sampling):
        for text, piece in zip(written, pieces, strict=True):
            text.extend(piece)
    theirs = [golden[f"written {i}"].tolist() for i in range(len(PROMPTS))]
    assert [len(text) for text in theirs] == [10, 12, 9]
    assert ([written[i] for i in same] == [theirs[i] for i in same]) == (history == "latents")


def test_there_and_back(directory: Path, tmp_path: Path) -> None:
    """What is read and written gives the same tensors, but for the matrix that is folded into the embedding."""
    vae = cola_format.read_vae(directory)
    network, flow = cola_format.read_dit(directory)
    cola_format.write(vae, network, flow, tmp_path / "again")
    again = cola_format.read_vae(tmp_path / "again")
    assert again.config == vae.config
    for name, value in vae.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    network2, flow2 = cola_format.read_dit(tmp_path / "again")
    assert (network2.config, flow2) == (network.config, flow)
    for name, value in network.state_dict().items():
        assert torch.equal(value, network2.state_dict()[name]), name


@torch.no_grad()
def test_scaled_latents(case: str, golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Their DiT and decoder see (latent - shift) * scale, our DiT the same, our decoder the latent itself."""
    plain = cola_format.read_vae(write_release(tmp_path / "plain", case, golden))
    changes = {"scaling_factor": 0.5, "shifting_factor": 0.3}
    scaled = cola_format.read_vae(write_release(tmp_path / "scaled", case, golden, vae=changes))
    ids, layout, _ = texts()
    layout = plain.layout(layout.segment, layout.position)
    seen = scaled.standardise(scaled.encode(ids, layout)[0])
    torch.testing.assert_close(seen, (plain.encode(ids, layout)[0] - 0.3) * 0.5)
    ours = scaled.decode(scaled.unstandardise(seen), layout)
    torch.testing.assert_close(ours, plain.decode(seen, layout), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vae", {"patch_size": 2}, "cola_vae/config.json: patch_size is 2; only 1 is known here"),
        ("dit", {"qk_bias": True}, "cola_dit/config.json: qk_bias is True"),
        ("dit", {"num_layers": 3}, "its tensors are not those of its config.json"),
    ],
)
def test_what_is_not_known_is_refused(part: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    arrays = np.load(cola_golden.FILE)
    golden = {name: arrays[f"causal/{name}"] for name in ("vae_shapes", "dit_shapes")}
    release = write_release(tmp_path / "release", "causal", golden, **{part: changes})
    with pytest.raises(ConfigError, match=message):
        (cola_format.read_vae if part == "vae" else cola_format.read_dit)(release)


def test_a_release_in_pieces(shards: Path, tmp_path: Path) -> None:
    """What is missing, cut or of another model is told by its file."""
    from megatext.tokenizer import load_tokenizer

    arrays = np.load(cola_golden.FILE)
    golden = {name: arrays[f"causal/{name}"] for name in ("vae_shapes", "dit_shapes")}
    release = write_release(tmp_path / "release", "causal", golden)
    load_tokenizer(shards / "tokenizer").save_json(release)
    with pytest.raises(ConfigError, match="the tokenizer has 300 ids, the VAE 40"):
        TextGenerator.from_pretrained(release)
    with pytest.raises(ConfigError, match="the tokenizer has 300 ids, the VAE 40"):
        load_text_vae(release)
    vae = cola_format.read_vae(release)
    other = TextVAE(replace(vae.config, latent_channels=4), 40)
    cola_format.write(other, *cola_format.read_dit(release), tmp_path / "mixed")
    with pytest.raises(ConfigError, match="cola_vae has 4 latent channels, cola_dit 6"):
        cola_format.read(tmp_path / "mixed")
    weights, config = (release / "cola_dit" / name for name in ("model.safetensors", "config.json"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model.safetensors: cannot be read .*is it whole"):
        cola_format.read_dit(release)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"cola_dit: holds no \*.safetensors"):
        cola_format.read_dit(release)
    for text in ("{", None):
        config.unlink() if text is None else config.write_text(text)
        with pytest.raises(ConfigError, match="cola_dit/config.json: not the config.json of a model in Cola DLM's"):
            cola_format.read_dit(release)


def test_export_of_a_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was trained here, written with --format cola-dlm, reads text as it does from our own format, and
    writes the same; the harness opens it too."""
    from evaluation.systems import open_model
    from megatext import export as exporting
    from megatext.tokenizer import load_tokenizer

    arrays = np.load(cola_golden.FILE)
    golden = {name: arrays[f"causal/{name}"] for name in ("vae_shapes", "dit_shapes")}
    release = write_release(tmp_path / "release", "causal", golden)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"

    def export(run: Path, output: Path, **options: Any) -> tuple[Path, str]:
        vae, (network, flow) = cola_format.read_vae(release), cola_format.read_dit(release)
        vae = widen(vae, load_tokenizer(shards / "tokenizer").vocab_size)
        write_vae(output / "vae", vae.config, vae.state_dict(), tokenizer=shards / "tokenizer")
        config = TextDiTRecipeConfig(vae="vae", network=network.config, flow=flow)
        weights = network.state_dict()
        write_model(output, "text_dit", config, weights, tokenizer=shards / "tokenizer", vae=output / "vae")
        return run, "raw weights"

    monkeypatch.setattr(exporting, "export", export)
    for output, options in ((ours, []), (theirs, ["--format", "cola-dlm"])):
        exporting.main(["--run", str(tmp_path), "--output", str(output), *options])
    assert sorted(path.name for path in theirs.iterdir() if not path.name.startswith("tokenizer_")) == [
        "cola_dit",
        "cola_vae",
        "tokenizer.json",
    ]
    sampling = SamplingConfig(steps=4, grid="uniform", guidance_scale=2.0, history="latents")
    prompts = ["The quick brown", "Numbers such as 1, 2"]
    written = []
    for directory in (ours, theirs):
        generator = TextGenerator.from_pretrained(directory)
        requests = [Request(generator.tokenizer.encode(text), 9, seed) for seed, text in enumerate(prompts)]
        assert [generator.tokenizer.decode(request.prompt) for request in requests] == prompts
        written.append([(requests, *generator._pieces(requests, sampling))])
    assert written[0] == written[1]
    assert open_model(theirs, {"steps": 4}, name="cola", dtype="fp32", device="cpu").fingerprint()


def widen(vae: TextVAE, vocab_size: int) -> TextVAE:
    """The same with random embeddings for a larger vocabulary."""
    wide = TextVAE(vae.config, vocab_size)
    weights = vae.state_dict()
    generator = torch.Generator().manual_seed(0)
    for name in ("embedding.weight", "unembedding.weight", "unembedding.bias"):
        weights[name] = torch.randn(wide.state_dict()[name].shape, generator=generator)
    wide.load_state_dict(weights)
    return wide


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"role_embedding": True}, "needs network.role_embedding False, it is True"),
        ({"trunk": {"norm": "rms"}}, "needs network.trunk.norm 'layer', it is 'rms'"),
    ],
)
def test_what_the_format_has_no_words_for(network: dict[str, Any], message: str, tmp_path: Path) -> None:
    arrays = np.load(cola_golden.FILE)
    golden = {name: arrays[f"causal/{name}"] for name in ("vae_shapes", "dit_shapes")}
    release = write_release(tmp_path / "release", "causal", golden)
    vae, (dit, flow) = cola_format.read_vae(release), cola_format.read_dit(release)
    config = replace(dit.config, trunk=replace(dit.config.trunk, **network.pop("trunk", {})), **network)
    with pytest.raises(ConfigError, match=message):
        cola_format.write(vae, TextDiT(config, cola_golden.CHANNELS, 0), flow, tmp_path / "out")
    with pytest.raises(ConfigError, match="objective velocity on the linear path in blocks"):
        cola_format.write(vae, dit, replace(flow, objective="x0"), tmp_path / "out")
    vae.latent_mean.fill_(0.1)
    with pytest.raises(ConfigError, match="standardised: false"):
        cola_format.write(vae, dit, flow, tmp_path / "out")
    assert not (tmp_path / "out").exists()
