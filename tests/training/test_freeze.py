"""Fine-tuning a decoder while the encoder and the codebook stay as they are, and the adaptive adversarial weight."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from detailflow import DetailFlowGPT, DetailFlowTokenizer, ViTConfig
from detailflow.data.images import open_images
from detailflow.data.tokens import CLEAN, INPUT, TokenStore
from detailflow.data.transforms import center_crop, ten_crops, to_tensor
from detailflow.errors import DetailFlowError
from detailflow.models import pretrained
from detailflow.psnr import psnr
from detailflow.training import sampled_rows
from detailflow.training.config import Extraction, LoopConfig, TokenizerTraining
from detailflow.training.extract import codes_fingerprints, extract
from detailflow.training.tokenizer import TokenizerStage, initial_tokenizer, train_tokenizer


def training(cifar: Path, model: Path, **settings: Any) -> TokenizerTraining:
    sizes = DetailFlowTokenizer.from_pretrained(model / "tokenizer").config
    loop = LoopConfig(steps=40, batch_size=16, learning_rate=5e-3, precision="fp32", trackers=(), pictures_every=1000)
    given: dict[str, Any] = dict(
        loop=loop,
        init=str(model / "tokenizer"),
        freeze="encoder",
        adversarial=0.0,
        coarse_probability=0.1,
        max_scale=1.0,
    )
    return TokenizerTraining(str(cifar), sizes, **given | settings)


@pytest.fixture(scope="module")
def images(cifar: Path) -> torch.Tensor:
    source = open_images(cifar)
    return torch.stack([to_tensor(center_crop(source.image(i * 4), 32)) for i in range(50)])


def quality(tokenizer: DetailFlowTokenizer, images: torch.Tensor) -> float:
    return float(psnr(tokenizer.decode(tokenizer.encode(images)).clamp(-1, 1), images, peak=2).mean())


@pytest.mark.parametrize(("stored", "flip"), [(False, True), (True, True), (True, False)])
def test_the_decoder_learns_and_tokens_stay(
    stored: bool, flip: bool, cifar: Path, model: Path, images: torch.Tensor, tmp_path: Path
):
    settings: dict[str, Any] = {}
    if stored:
        settings["tokens"] = str(tmp_path / "tokens")
        extract(Extraction(str(cifar), str(model / "tokenizer"), flip=flip), tmp_path / "tokens", "cpu")
    train_tokenizer(training(cifar, model, muon=1e-3, **settings), tmp_path / "run", "cpu")
    before, after = (DetailFlowTokenizer.from_pretrained(path) for path in (model / "tokenizer", tmp_path / "run"))
    assert torch.equal(before.encode(images), after.encode(images))
    wrong = torch.randint(before.config.codebook_size, (50, 4))
    assert torch.equal(*(one.encode_correction(images, position=4, wrong_tokens=wrong) for one in (before, after)))
    assert quality(after, images) > quality(before, images) + 1
    states = before.state_dict(), after.state_dict()
    changed = {name.split(".")[0] for name, value in states[0].items() if not torch.equal(value, states[1][name])}
    assert changed == {"decoder"}


def test_a_decoder_of_another_size_begins_anew(cifar: Path, model: Path, images: torch.Tensor, tmp_path: Path):
    settings = training(cifar, model, new_decoder=True, muon=1e-3)
    sizes = replace(settings.model, decoder=ViTConfig(width=64, depth=2, heads=2), pixel_channels=8)
    assert sizes.decoder.width != settings.model.decoder.width
    settings = replace(settings, model=sizes)
    with pytest.raises(DetailFlowError, match="do not fit: decoder is"):
        train_tokenizer(replace(settings, new_decoder=False), tmp_path / "run", "cpu")
    with pytest.raises(DetailFlowError, match="new_decoder trains a decoder for the tokens of init: set freeze"):
        replace(settings, freeze=None)
    torch.manual_seed(settings.loop.seed)
    fresh = initial_tokenizer(settings)
    train_tokenizer(settings, tmp_path / "run", "cpu")
    before, after = (DetailFlowTokenizer.from_pretrained(path) for path in (model / "tokenizer", tmp_path / "run"))
    assert after.config == sizes and torch.equal(before.encode(images), after.encode(images))
    assert quality(after, images) > quality(fresh.eval(), images) + 3
    assert next(codes_fingerprints(str(tmp_path / "run"))) == next(codes_fingerprints(str(model / "tokenizer")))
    smaller = replace(sizes, decoder=ViTConfig(width=32, depth=1, heads=2), pixel_channels=3)  # fewer weights, too
    again = initial_tokenizer(replace(settings, init=str(tmp_path / "run"), model=smaller)).eval()
    assert torch.equal(again.encode(images), before.encode(images))


def test_rows_of_a_store_are_of_their_crops(cifar: Path, model: Path, tmp_path: Path):
    store = extract(Extraction(str(cifar), str(model / "tokenizer")), tmp_path / "tokens", "cpu")
    stage = TokenizerStage(
        training(cifar, model, tokens=str(tmp_path / "tokens")), open_images(cifar), tmp_path, torch.device("cpu")
    )
    pixels, labels, rows = next(stage.batches(0))
    assert pixels.shape == (16, 32, 32, 3) and labels.shape == (16,) and rows.shape == (16, 2, 16)
    assert torch.equal(stage.model.encode(to_tensor(pixels)), rows[:, 0])
    source = open_images(cifar)
    found = [torch.as_tensor(ten_crops(source.image(i), 32).copy()) for i in range(len(source))]
    assert all(any(bool((x == crops).flatten(1).all(1).any()) for crops in found) for x in pixels)
    planted = torch.from_numpy(store.codes[:, :, INPUT].astype("int64")).flatten(0, 1)
    assert all(bool((row == planted).all(1).any()) for row in rows[:, 1]) and (CLEAN, INPUT) == (0, 1)
    again = next(stage.batches(0))
    assert all(torch.equal(a, b) for a, b in zip(again, (pixels, labels, rows), strict=True))
    scalars = stage.step(0, (pixels, labels, rows), 1e-3)
    assert "quantization" not in scalars and float(scalars["pixel"]) > 0
    assert all(p.grad is None for p in stage.model.encoder.parameters())


def test_tokens_of_mirror_images_and_of_held_out_ones_are_refused(cifar: Path, model: Path, tmp_path: Path):
    extract(Extraction(str(cifar), str(model / "tokenizer"), val_share=0.1), tmp_path / "tokens", "cpu")

    def stage(tokens: Path, **settings: Any) -> TokenizerStage:
        config = training(cifar, model, tokens=str(tokens), val_share=0.1, **settings)
        return TokenizerStage(config, open_images(cifar), tmp_path, torch.device("cpu"))

    with pytest.raises(DetailFlowError, match="tokens has tokens of mirror images: extract them with --flip false"):
        stage(tmp_path / "tokens", flip=False)
    with pytest.raises(DetailFlowError, match="validation has the images held out from .*tokens: train on .*tokens"):
        stage(tmp_path / "tokens" / "validation")


def test_codes_are_counted_anew_with_a_frozen_encoder(cifar: Path, model: Path, tmp_path: Path):
    stage = TokenizerStage(training(cifar, model, revive_every=2), open_images(cifar), tmp_path, torch.device("cpu"))
    codebook = stage.model.quantizer.codebook.clone()
    batches, counted = stage.batches(0), []
    for step in range(4):
        stage.step(step, next(batches), 1e-3)
        counted.append(float(stage.counts.sum()) > 0)
    assert counted == [True, False, True, False] and torch.equal(stage.model.quantizer.codebook, codebook)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_became_unreadable(workers: int, cifar: Path, model: Path, tmp_path: Path):
    images = Path(shutil.copytree(cifar, tmp_path / "images"))
    extract(Extraction(str(images), str(model / "tokenizer")), tmp_path / "tokens", "cpu")
    config = training(images, model, tokens=str(tmp_path / "tokens"))
    config = replace(config, loop=replace(config.loop, workers=workers))
    stage = TokenizerStage(config, open_images(images), tmp_path, torch.device("cpu"))
    assert len(pickle.dumps(stage.rows.store)) < 1000  # a worker maps the codes itself
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DetailFlowError, match=r"\.png") as failure:
        next(stage.batches(0))
    assert "Traceback" not in str(failure.value)


def test_rows_of_a_store_with_nested_dropout(cifar: Path, model: Path, tmp_path: Path):
    settings = training(cifar, model)
    sizes, made = replace(settings.model, absent_token=True), str(tmp_path / "tokenizer")
    DetailFlowTokenizer(sizes).save_pretrained(made)
    extract(Extraction(str(cifar), made), tmp_path / "tokens", "cpu")
    nested: dict[str, Any] = dict(coarse_probability=0.0, nested_probability=1.0, correction_share=0.5)
    settings = replace(settings, model=sizes, init=made, tokens=str(tmp_path / "tokens"), **nested)
    stage = TokenizerStage(settings, open_images(cifar), tmp_path, torch.device("cpu"))
    scalars = stage.step(0, next(stage.batches(0)), 1e-3)
    assert float(scalars["pixel"]) > 0 and "psnr_nested" in scalars


def sampling(cifar: Path, model: Path, **settings: Any) -> TokenizerTraining:
    given = dict(gpt=str(model / "gpt"), adversarial=0.5, adversarial_from=0.0, adversarial_adaptive=True)
    return training(cifar, model, coarse_probability=0.0, **given | settings)


def test_sampled_rows_are_judged_and_stay_near_the_first_decoder(
    cifar: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sampled_rows, "ROWS", 32)
    source, distances = open_images(cifar), {}
    for anchor in (0.0, 100.0):
        stage = TokenizerStage(sampling(cifar, model, anchor=anchor), source, tmp_path, torch.device("cpu"))
        assert stage.sampled is not None
        ids = stage.sampled.ids
        assert ids.shape == (32, 16) and len(ids.unique(dim=0)) > 8
        batches = stage.batches(0)
        for step in range(10):
            scalars = stage.step(step, next(batches), 5e-3)
            assert {"anchor", "adversarial_sampled", "discriminator"} <= scalars.keys()
            assert step or float(scalars["anchor"]) < 1e-9  # the same decoder at first
        with torch.no_grad():
            distances[anchor] = float(stage.sampled.distance(stage.model.decode(ids), ids))
    assert 0 < distances[100.0] < distances[0.0] / 2


def test_no_sampled_rows_in_steps_without_the_adversarial_loss(
    cifar: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = sampling(cifar, model, adversarial_from=0.5)
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(pretrained, "choose_dtype", lambda dtype, _: dtype or torch.bfloat16)
        stage = TokenizerStage(config, open_images(cifar), tmp_path, torch.device("cpu"))
    assert stage.sampled is not None and stage.sampled.start.decoder.project.weight.dtype == torch.float32
    batch = next(stage.batches(0))
    assert "anchor" not in stage.step(0, batch, 1e-3) and "anchor" in stage.step(39, batch, 1e-3)


@pytest.mark.parametrize("changed", ["gpt", "tokenizer"])
def test_a_run_goes_on_with_the_same_models_only(
    changed: str, cifar: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As the rows are sampled again, and kept near what the first decoder makes of them."""
    monkeypatch.setattr(sampled_rows, "ROWS", 32)
    own = Path(shutil.copytree(model, tmp_path / "model"))
    loop = LoopConfig(steps=1, batch_size=4, learning_rate=1e-3, trackers=())
    train_tokenizer(sampling(cifar, own, loop=loop), tmp_path / "run", "cpu")
    other: Any = {"gpt": DetailFlowGPT, "tokenizer": DetailFlowTokenizer}[changed].from_pretrained(own / changed)
    next(other.parameters()).data.add_(1)
    other.save_pretrained(own / changed)
    with pytest.raises(DetailFlowError, match=f"with (an)?other {'init' if changed == 'tokenizer' else 'gpt'}"):
        train_tokenizer(sampling(cifar, own, loop=replace(loop, steps=2)), tmp_path / "run", "cpu")


def test_an_ar_model_of_other_tokens_is_refused(cifar: Path, model: Path, tmp_path: Path):
    config = DetailFlowGPT.from_pretrained(model / "gpt").config
    DetailFlowGPT(replace(config, codebook_size=2 * config.codebook_size)).save_pretrained(tmp_path / "gpt")
    with pytest.raises(DetailFlowError, match="writes other tokens than those of .*codebook_size is"):
        config = sampling(cifar, model, gpt=str(tmp_path / "gpt"))
        TokenizerStage(config, open_images(cifar), tmp_path, torch.device("cpu"))


def test_stores_that_do_not_fit(cifar: Path, model: Path, tokens: Path, tmp_path: Path):
    source = open_images(cifar)

    def stage(**settings: Any) -> None:
        TokenizerStage(training(cifar, model, **settings), source, tmp_path, torch.device("cpu"))

    stage(tokens=str(tokens))
    with pytest.raises(DetailFlowError, match="is not a token store"):
        stage(tokens=str(tmp_path))
    other = DetailFlowTokenizer(DetailFlowTokenizer.from_pretrained(model / "tokenizer").config)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(DetailFlowError, match="has tokens of another tokenizer than .*other: extract them again"):
        stage(tokens=str(tokens), init=str(tmp_path / "other"))
    few = tmp_path / "few"
    (few / "class0").mkdir(parents=True)
    path = next((cifar / "class0").iterdir())
    (few / "class0" / path.name).write_bytes(path.read_bytes())
    config = replace(training(cifar, model, tokens=str(tokens)), data=str(few))
    with pytest.raises(DetailFlowError, match="has tokens of class., which is not among the images|has tokens of"):
        TokenizerStage(config, open_images(few), tmp_path, torch.device("cpu"))
    config = training(cifar, model, tokens=str(tokens), val_share=0.3)
    with pytest.raises(DetailFlowError, match=r", which val_share 0\.3 holds out: repeat the val_share of the tokens"):
        train_tokenizer(config, tmp_path / "held-out", "cpu")
    changed = shutil.copytree(cifar, tmp_path / "changed")
    Image.new("RGB", (40, 32)).save(next((changed / "class0").iterdir()))
    config = replace(training(cifar, model, tokens=str(tokens)), data=str(changed))
    with pytest.raises(DetailFlowError, match="tokens of other images of the same names: extract those of .*changed"):
        TokenizerStage(config, open_images(changed), tmp_path, torch.device("cpu"))
    assert len(TokenStore.open(tokens)) == 200
    damaged = shutil.copytree(tokens, tmp_path / "damaged")
    content = bytearray((damaged / "codes.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "codes.bin").write_bytes(content)
    with pytest.raises(DetailFlowError, match="codes.bin is damaged"):
        train_tokenizer(training(cifar, model, tokens=str(damaged)), tmp_path / "run", "cpu")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(freeze="decoder"), "freeze must be encoder, not 'decoder'"),
        (dict(init=None), "give that tokenizer as init"),
        (dict(alignment=0.1), "set alignment to 0"),
        (dict(freeze=None, tokens="x"), "set freeze to encoder"),
        (dict(gpt="x"), "set freeze to encoder and adversarial above 0, or gpt to null"),
        (dict(gpt="x", adversarial=0.5, sampled_share=0), "sampled_share must be more than 0"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], sentence: str, cifar: Path, model: Path):
    with pytest.raises(DetailFlowError, match=sentence):
        training(cifar, model, **settings)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_tokens", 24), ("group_size", 2), ("causal_tokens", 8), ("causal_encoder", False), ("alpha", 2.5)],
)
def test_what_makes_other_tokens(cifar: Path, model: Path, tmp_path: Path, key: str, value: float):
    """Or, as alpha does, tokens that nobody would know again."""
    config = training(cifar, model)
    there = getattr(config.model, key)
    config = replace(config, model=replace(config.model, **{key: value}))
    with pytest.raises(DetailFlowError, match=rf"would be others: {key} is {there} there and {value} here"):
        TokenizerStage(config, open_images(cifar), tmp_path, torch.device("cpu"))


ORDER = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
sys.path.append(sys.argv[1])
from test_freeze import TokenizerStage, open_images, training
torch.set_num_threads(1)
settings = dict(adversarial=0.5, adversarial_from=0.0, adversarial_adaptive=True, perceptual=0.5, freeze=None)
config = training(Path(sys.argv[2]), Path(sys.argv[3]), **settings)
stage = TokenizerStage(config, open_images(sys.argv[2]), Path(sys.argv[4]), torch.device("cpu"))
for step, batch in zip(range(3), stage.batches(0)):
    stage.step(step, batch, 1e-3)
print(stage.model.fingerprint(), float(sum(weight.double().sum() for weight in stage.model.state_dict().values())))
"""


def test_nothing_depends_on_pythons_hashes(cifar: Path, model: Path, tmp_path: Path):
    """Gradients were added up in the order of a set of texts, which differs from process to process."""
    said = set()
    for seed in ("0", "1", "2"):
        argv = [sys.executable, "-c", ORDER, str(Path(__file__).parent), str(cifar), str(model), str(tmp_path / seed)]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        (tmp_path / seed).mkdir()
        done = subprocess.run(argv, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    assert len(said) == 1


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_the_adaptive_weight_is_the_ratio_of_gradients(compute: str, cifar: Path, model: Path, tmp_path: Path):
    """With it, a step's gradient is that of the plain objective whose adversarial weight is the product."""
    config = training(cifar, model, adversarial=0.5, adversarial_from=0.0, adversarial_adaptive=True, freeze=None)
    config = replace(config, loop=replace(config.loop, precision=compute, batch_size=8))
    source = open_images(cifar)
    stage = TokenizerStage(config, source, tmp_path, torch.device("cpu"))
    images = to_tensor(next(stage.batches(0))[0])
    torch.manual_seed(3)
    draw = stage.draw(0)._replace(position=None, choice=None)
    last = stage.model.decoder.to_pixels.weight

    def gradients(total: torch.Tensor) -> dict[str, torch.Tensor]:
        total.backward()
        found = {n: p.grad.clone() for n, p in stage.networks.named_parameters() if p.grad is not None}
        stage.networks.zero_grad()
        return found

    adaptive = stage.objective(0, images, draw)
    mine = gradients(adaptive.total)
    stage.config = replace(config, adversarial_adaptive=False)
    stage.adversary.network.eval()  # spectral norms stay
    plain = stage.objective(0, images, draw)
    norms = [
        torch.autograd.grad(plain.terms[n][1], last, retain_graph=True)[0].norm() for n in ("pixel", "adversarial")
    ]
    weight = 0.5 * norms[0] / norms[1]
    assert float(adaptive.terms["adversarial"][0]) == pytest.approx(float(weight), rel=2e-2)
    for name, (_, value) in plain.terms.items():
        assert value.item() == pytest.approx(adaptive.terms[name][1].item(), rel=2e-2)
    plain.terms["adversarial"] = (adaptive.terms["adversarial"][0], plain.terms["adversarial"][1])
    for name, gradient in gradients(plain.total).items():
        torch.testing.assert_close(mine[name], gradient, rtol=0.1, atol=0.02 * float(gradient.abs().max()) + 1e-7)


@pytest.mark.slow
def test_a_compiled_run_in_which_the_discriminator_begins_later(cifar: Path, model: Path, tmp_path: Path):
    """What is compiled for the steps before it must do for those with the adaptive weight."""
    later = dict(adversarial=0.5, adversarial_from=0.5, adversarial_adaptive=True, freeze=None, coarse_probability=0.0)
    config = training(cifar, model, **later)
    config = replace(config, loop=replace(config.loop, steps=4, batch_size=8, compile=True, log_every=1))
    train_tokenizer(config, tmp_path / "run", "cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    weighed = [line["step"] for line in lines if line.get("adversarial_weight")]
    assert weighed == [3, 4]
