"""Token extraction (docs/method.md#extraction) against the tokenizer's public contract."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detailflow import DetailFlowTokenizer, hub
from detailflow.data.images import open_images
from detailflow.data.token_writer import TokenWriter
from detailflow.data.tokens import CLEAN, INPUT, LABEL, VALIDATION, TokenStore
from detailflow.data.transforms import center_crop, ten_crops, to_tensor, two_crops
from detailflow.errors import DetailFlowError
from detailflow.training import extract as extraction
from detailflow.training.config import Extraction, GPTTraining, LoopConfig
from detailflow.training.extract import code_rows, codes_fingerprints, extract, made_by
from detailflow.training.gpt import train_gpt


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> DetailFlowTokenizer:
    return DetailFlowTokenizer.from_pretrained(model)


@pytest.fixture
def folder(cifar: Path, tmp_path: Path) -> Path:
    """A copy of 20 of the images, in two classes, to do harm to."""
    for k, path in enumerate(sorted(cifar.rglob("*.png"))[:20]):
        copy = tmp_path / "images" / ("even", "odd")[k % 2] / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return tmp_path / "images"


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def run(data: Path, model: Path, output: Path, **settings: object) -> TokenStore:
    return extract(Extraction(str(data), str(model), **settings), output, "cpu")  # type: ignore[arg-type]


def test_rows_agree_with_the_public_contract(tokenizer: DetailFlowTokenizer, cifar: Path):
    """Every position of the schedule at once, one per image."""
    source, schedule = open_images(cifar), tokenizer.schedule
    starts = [start for start, _ in schedule.steps]
    images = torch.stack([to_tensor(two_crops(source.image(i), 32)[0]) for i in range(len(starts))])
    with torch.no_grad():
        rows = code_rows(tokenizer, images, torch.tensor(starts), torch.Generator().manual_seed(0))
    assert rows.shape == (len(starts), 3, 16) and rows.dtype == torch.int64
    for image, p, (clean, given, wanted) in zip(images[:, None], starts, rows, strict=True):
        end = p + 1 if p < 4 else p + 4
        assert torch.equal(clean[None], tokenizer.encode(image))
        assert torch.equal(given[None], tokenizer.encode_correction(image, position=p, wrong_tokens=given[None, p:end]))
        assert torch.equal(wanted, torch.cat((given[:p], clean[p:end], given[end:])))
        assert torch.equal(given[:p], clean[:p])
        z = tokenizer.encode_latents(tokenizer.encode_patches(image), 16)[0, p:end]
        nearest = torch.cdist(z, tokenizer.quantizer.codes()).argsort(-1)[:, :50]  # of 64 codes
        assert (nearest == given[p:end, None]).any(-1).all()


def test_searched_rows(tokenizer: DetailFlowTokenizer, folder: Path, model: Path, tmp_path: Path):
    store = run(folder, model, tmp_path / "store", crops="two", search=4)
    plain = run(folder, model, tmp_path / "plain", crops="two")
    source = open_images(folder)
    crops = to_tensor(np.concatenate([two_crops(source.image(i), 32) for i in range(20)]))
    assert (store.codes.reshape(-1, 3, 16)[:, CLEAN] == tokenizer.encode(crops, search=4).numpy()).mean() > 0.9
    errors = {}
    for name, codes in (("plain", plain.codes), ("searched", store.codes)):
        for row in (CLEAN, INPUT):
            pixels = tokenizer.decode(torch.from_numpy(codes.reshape(-1, 3, 16)[:, row].astype(np.int64)))
            errors[name, row] = (pixels - crops).square().mean().item()
    assert errors["searched", CLEAN] < errors["plain", CLEAN]
    assert errors["searched", INPUT] < errors["plain", INPUT]  # what comes after the mistakes is searched, too
    for image in store.codes.reshape(-1, 3, 16):  # what stands before and at the mistakes is clean
        later = np.flatnonzero(image[INPUT] != image[LABEL])
        end = later[-1] + 1 if len(later) else 1
        first = later[0] if len(later) else 0
        np.testing.assert_array_equal(image[LABEL][:first], image[CLEAN][:first])
        np.testing.assert_array_equal(image[LABEL][first:end], image[CLEAN][first:end])
    with pytest.raises(DetailFlowError, match=r"holds tokens with another search \(4, not 0\)"):
        run(folder, model, tmp_path / "store", crops="two")


@pytest.mark.parametrize("finished", [True, False])
def test_searched_codes_are_of_one_decoder(
    finished: bool, folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Other tokens stay good when a decoder learns on."""
    other = DetailFlowTokenizer.from_pretrained(model)
    with torch.no_grad():
        other.decoder.to_pixels.bias += 0.1
    other.save_pretrained(tmp_path / "other")
    for search in (0, 1):
        with monkeypatch.context() as patch:
            if not finished:
                patch.setattr(extraction, "CHUNK_IMAGES", 4)
                patch.setattr(TokenWriter, "write", interrupting(TokenWriter.write, 3))
            with nullcontext() if finished else pytest.raises(KeyboardInterrupt):
                run(folder, model, tmp_path / f"store-{search}", crops="two", search=search)
    before = files_in(tmp_path / "store-1")
    assert len(run(folder, tmp_path / "other", tmp_path / "store-0", crops="two")) == 20
    with pytest.raises(DetailFlowError, match="holds tokens of another decoder, which searched them: repeat"):
        run(folder, tmp_path / "other", tmp_path / "store-1", crops="two", search=1)
    assert files_in(tmp_path / "store-1") == before
    assert len(run(folder, model, tmp_path / "store-1", crops="two", search=1)) == 20


def interrupting(write: Callable[..., None], chunks: int) -> Callable[..., None]:
    """Ctrl-C after so many chunks."""
    left = iter(range(chunks))

    def stopping(*given: Any) -> None:
        write(*given)
        if next(left, None) is None:
            raise KeyboardInterrupt

    return stopping


def test_mistakes_are_uniform_over_the_nearest_50(tokenizer: DetailFlowTokenizer):
    z = torch.nn.functional.normalize(torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    nearest = torch.cdist(z[0], tokenizer.quantizer.codes()).argsort(-1)[0, :50].tolist()
    drawn = tokenizer.plant_mistakes(z.expand(1, 20000, 4), generator=torch.Generator().manual_seed(1))[0]
    counts = torch.bincount(drawn, minlength=64)[nearest].double()
    assert counts.sum() == 20000
    assert float(((counts - 400) ** 2 / 400).sum()) < 49 + 5 * 98**0.5


def test_a_folder(tokenizer: DetailFlowTokenizer, tokens: Path, cifar: Path):
    store, source = TokenStore.open(tokens), open_images(cifar)
    assert len(store) == 200 and store.codes.shape == (200, 2, 3, 16)
    assert store.info.class_names == source.class_names == tuple(f"class{k}" for k in range(10))
    np.testing.assert_array_equal(store.labels, source.labels)
    for i in (0, 77, 199):
        crops = to_tensor(two_crops(source.image(i), 32))
        np.testing.assert_array_equal(store.codes[i, :, CLEAN], tokenizer.encode(crops))


def test_one_position_per_image(tokens: Path):
    """All crops of an image have their mistakes at one place, and over the images every step is such a place."""
    store = TokenStore.open(tokens)
    differ = store.codes[:, :, INPUT] != store.codes[:, :, LABEL]  # a mistake may be right by chance: 1 in 50
    starts = []
    for image in differ:
        at = np.flatnonzero(image.any(0))
        if not len(at):
            continue
        group = at[0] // 4 * 4
        start = at[0] if at[0] < 4 else group
        assert at[-1] < (start + 1 if start < 4 else start + 4)
        starts.append(int(start))
    shares = np.bincount(starts, minlength=16) / len(starts)  # p uniform in [0, 12): 1/12 each below c, 1/3 per group
    assert shares[:4] == pytest.approx(1 / 12, abs=0.08)
    assert shares[[4, 8]] == pytest.approx(1 / 3, abs=0.13)
    assert shares[12] == 0


def test_without_mirror_images(tokenizer: DetailFlowTokenizer, folder: Path, model: Path, tmp_path: Path):
    """Text, or anything else with a left and a right, is not mirrored; a store is of the one kind or the other."""
    store = run(folder, model, tmp_path / "store", crops="two", flip=False)
    assert store.codes.shape == (20, 1, 3, 16) and store.info.crops == 1
    crop = to_tensor(center_crop(open_images(folder).image(7), 32))[None]
    np.testing.assert_array_equal(store.codes[7, :, CLEAN], tokenizer.encode(crop))
    with pytest.raises(DetailFlowError, match="another flip"):
        run(folder, model, tmp_path / "store", crops="two")


def test_names_whatever_the_folder_is_called(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(folder)
    store = run(Path("."), model, tmp_path / "store", crops="two")
    assert store.ids() == names_in(folder)
    assert run(folder, model, tmp_path / "store", crops="two").fingerprint == store.fingerprint


def test_a_refused_extraction_leaves_nothing(folder: Path, model: Path, tmp_path: Path):
    """A store for validation inside a store of all images would judge training by what it trains on."""
    whole = run(folder, model, tmp_path / "store", crops="two")
    with pytest.raises(DetailFlowError, match="holds tokens of other images"):
        run(folder, model, tmp_path / "store", crops="two", val_share=0.3)
    assert not (tmp_path / "store" / VALIDATION).exists() and TokenStore.open(tmp_path / "store").validation is None
    assert TokenStore.open(tmp_path / "store").fingerprint == whole.fingerprint


def test_damaged_tokens_for_validation(folder: Path, model: Path, tmp_path: Path):
    codes = run(folder, model, tmp_path / "store", crops="two", val_share=0.3).directory / VALIDATION / "codes.bin"
    content = bytearray(codes.read_bytes())
    content[2] ^= 1
    codes.write_bytes(content)
    config = GPTTraining(
        str(tmp_path / "store"), str(model / "tokenizer"), LoopConfig(1, 4, 0.1), width=16, depth=1, heads=2
    )
    with pytest.raises(DetailFlowError, match="validation/codes.bin is damaged"):
        train_gpt(config, tmp_path / "gpt", "cpu")


def test_ten_crops(tokenizer: DetailFlowTokenizer, folder: Path, model: Path, tmp_path: Path):
    store = run(folder, model, tmp_path / "store")
    assert store.codes.shape == (20, 10, 3, 16) and store.info.crops == 10
    crops = to_tensor(ten_crops(open_images(folder).image(7), 32))
    np.testing.assert_array_equal(store.codes[7, :, CLEAN], tokenizer.encode(crops))


def test_the_same_whatever_the_work_is_cut_into_and_another_with_another_seed(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(extraction, "CHUNK_IMAGES", 8)
    first = run(folder, model, tmp_path / "a", crops="two")
    for batch_size, workers in ((1, 0), (6, 2), (16, 1)):
        again = run(folder, model, tmp_path / f"{batch_size}", crops="two", batch_size=batch_size, workers=workers)
        assert files_in(again.directory) == files_in(first.directory)
    other = run(folder, model, tmp_path / "c", crops="two", seed=1)
    np.testing.assert_array_equal(first.codes[:, :, CLEAN], other.codes[:, :, CLEAN])
    assert (first.codes[:, :, INPUT] != other.codes[:, :, INPUT]).any()
    first.verify()
    assert first.ids() == names_in(folder)


def test_fewer_candidates(folder: Path, model: Path, tmp_path: Path):
    """The nearest code alone is no mistake."""
    store = run(folder, model, tmp_path / "store", crops="two", mistakes=1)
    np.testing.assert_array_equal(store.codes[:, :, INPUT], store.codes[:, :, LABEL])


def test_a_whole_prefix(folder: Path, tmp_path: Path):
    """c = N: every token is predicted alone, and the last may be wrong too."""
    from detailflow.models.layers import ViTConfig
    from detailflow.models.tokenizer import TokenizerConfig

    torch.manual_seed(0)
    vit = ViTConfig(16, 1, 2)
    config = TokenizerConfig(
        vit, vit, 32, 16, num_tokens=2, group_size=1, causal_tokens=2, codebook_size=64, codebook_dim=4
    )
    DetailFlowTokenizer(config).save_pretrained(tmp_path / "model")
    store = run(folder, tmp_path / "model", tmp_path / "store", crops="two")
    at = (store.codes[:, :, INPUT] != store.codes[:, :, LABEL]).any((0, 1))
    assert at.tolist() == [True, True]


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_a_small_set_has_small_chunks_and_keeps_those_that_it_was_begun_with(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = open_images(folder)
    assert extraction.chunk_images(tmp_path, source) == 64
    assert extraction.chunk_images(tmp_path, source.subset([0] * 5000)) == 5000 // 32
    assert extraction.chunk_images(tmp_path, source.subset([0] * 50_000)) == 512
    store = run(folder, model, tmp_path / "a", crops="two")
    before = files_in(store.directory)
    monkeypatch.setattr(extraction, "CHUNK_IMAGES", 8)
    assert extraction.chunk_images(tmp_path / "a", source) == 64
    assert files_in(run(folder, model, tmp_path / "a", crops="two").directory) == before


def test_ctrl_c_says_where_it_goes_on(folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is on disk by then stays, and the store is the same in the end."""
    monkeypatch.setattr(extraction, "CHUNK_IMAGES", 8)
    whole = run(folder, model, tmp_path / "whole", crops="two")
    write, done = TokenWriter.write, list[int]()

    def stopping(self: TokenWriter, chunk: int, *more: Any) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(chunk)
        write(self, chunk, *more)

    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "write", stopping)
        with pytest.raises(
            KeyboardInterrupt, match="^interrupted after the tokens of 8 of 20 images: the same command"
        ):
            run(folder, model, tmp_path / "a", crops="two")
    assert files_in(run(folder, model, tmp_path / "a", crops="two").directory) == files_in(whole.directory)


@pytest.mark.parametrize("first", [True, False])
def test_one_unreadable_image_is_left_out(
    first: bool, folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = folder / "even" / "000.png" if first else folder / "odd" / "zzz.png"
    path.write_text("not an image")
    count = len(open_images(folder))
    store = run(folder, model, tmp_path / "store", crops="two")
    assert len(store) == count - 1
    assert store.ids() == [name for name in names_in(folder) if name != str(path.relative_to(folder))]
    np.testing.assert_array_equal(store.labels, [name.startswith("odd") for name in store.ids()])
    clean = DetailFlowTokenizer.from_pretrained(model).encode(to_tensor(two_crops(open_images(folder).image(5), 32)))
    np.testing.assert_array_equal(store.read(np.full(2, 5 - first), np.arange(2), np.full(2, CLEAN)), clean)
    printed = "".join(capsys.readouterr())
    assert str(path) in printed and f"1 of {count} images could not be read and were left out" in printed


def test_more_than_one_in_a_hundred_stop_it(folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Once they are put right, the same command goes on."""
    whole = files_in(run(folder, model, tmp_path / "whole", crops="two", seed=3).directory)
    monkeypatch.setattr(extraction, "CHUNK_IMAGES", 8)
    whole8 = files_in(run(folder, model, tmp_path / "whole8", crops="two", seed=3).directory)
    source = open_images(folder)
    paths = [Path(source.name(slot)) for slot in (12, 15)]
    kept = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_text("not an image")
    for _ in range(2):
        with pytest.raises(DetailFlowError, match=f"2 images cannot be read, more than 1%.*{paths[0]}.*; {paths[1]}"):
            run(folder, model, tmp_path / "store", crops="two", seed=3)
        assert [path.name for path in (tmp_path / "store").rglob("chunk-*")] == ["chunk-000000.json"]
    for path, content in zip(paths, kept, strict=True):
        path.write_bytes(content)
    assert files_in(run(folder, model, tmp_path / "store", crops="two", seed=3).directory) == whole8 != whole


def test_nothing_that_can_be_read(model: Path, tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("not an image")
    with pytest.raises(DetailFlowError, match="no images"):
        run(tmp_path / "images", model, tmp_path / "store")


def test_wrong_settings():
    for setting, message in (
        ({"crops": "three"}, "crops must be ten, six or two, not 'three'"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"precision": "fp8"}, "precision must be .*fp32, not 'fp8'"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"seed": -1}, "seed must be 0 to"),
        ({"mistakes": 0}, "mistakes must be a positive integer"),
    ):
        with pytest.raises(DetailFlowError, match=message):
            Extraction("images", "model", **setting)  # type: ignore[arg-type]


@pytest.mark.parametrize("finished", [True, False])
def test_going_on_with_other_settings(
    finished: bool, folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stopped(writer: TokenWriter) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "store"
    if finished:
        run(folder, model, output, crops="two")
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(TokenWriter, "finish", stopped)
            run(folder, model, output, crops="two")
    before = files_in(output)
    other = DetailFlowTokenizer.from_pretrained(model)
    with torch.no_grad():
        other.quantizer.codebook[0, 0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    shutil.copytree(folder, tmp_path / "copy")
    for data, tokenizer, settings, message in (
        (folder, model, {"crops": "two", "seed": 1}, r"seed \(0, not 1\)"),
        (folder, model, {}, r"crops \('two', not 'ten'\)"),
        (folder, model, {"crops": "two", "precision": "bf16"}, r"precision \('fp32', not 'bf16'\)"),
        (folder, tmp_path / "other", {"crops": "two"}, "another tokenizer"),
    ):
        with pytest.raises(DetailFlowError, match=f"store holds tokens .*{message}: repeat its settings"):
            run(data, tokenizer, output, **settings)
    assert files_in(output) == before
    store = run(tmp_path / "copy", model, output, crops="two", batch_size=4, workers=1)  # the same images
    assert len(store) == 20
    assert all(files_in(output)[name] == before[name] for name in ("codes.bin", "ids.jsonl"))
    (folder / "odd" / "zzz.png").write_bytes(next(folder.rglob("*.png")).read_bytes())
    message = r"holds tokens of other images \(20 in 2 classes then, 21 in 2 classes now\)"
    with pytest.raises(DetailFlowError, match=message):
        run(folder, model, output, crops="two")


def test_a_store_is_tied_to_its_tokenizer(tokens: Path, model: Path, tmp_path: Path):
    other = DetailFlowTokenizer.from_pretrained(model)
    with torch.no_grad():
        other.quantizer.codebook[0, 0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    settings = dict(tokens=str(tokens), loop=LoopConfig(1, 4, 1e-3), width=32, depth=1, heads=2)
    with pytest.raises(
        DetailFlowError, match="these tokens were made by another tokenizer than .*other; extract them again"
    ):
        train_gpt(GPTTraining(tokenizer=str(tmp_path / "other"), **settings), tmp_path / "gpt", "cpu")  # type: ignore[arg-type]
    assert not (tmp_path / "gpt").exists()
    train_gpt(GPTTraining(tokenizer=str(model), **settings), tmp_path / "gpt", "cpu")  # type: ignore[arg-type]
    assert (tmp_path / "gpt" / "config.json").exists()


def test_a_decoder_that_learnt_on_has_the_same_tokens(tokens: Path, model: Path, tmp_path: Path):
    other = DetailFlowTokenizer.from_pretrained(model)
    with torch.no_grad():
        other.decoder.to_pixels.weight += 0.1
    other.save_pretrained(tmp_path / "other")
    store = TokenStore.open(tokens)
    assert made_by(store, tmp_path / "other")
    assert store.info.tokenizer_fingerprint == next(codes_fingerprints(model))
    info = replace(store.info, tokenizer_fingerprint=hub.fingerprint(*hub.load(model, "tokenizer")))
    store.info = info  # as version 0.1 wrote it
    assert made_by(store, model) and not made_by(store, tmp_path / "other")


def test_tokens_know_their_tokenizer_in_other_types(cifar: Path, model: Path, tmp_path: Path):
    """It encodes in float32, so one that is stored in 16 bits is the same as its copy in 32."""
    half, whole = tmp_path / "half", tmp_path / "whole"
    DetailFlowTokenizer.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(half)
    DetailFlowTokenizer.from_pretrained(half, dtype=torch.float32).save_pretrained(whole)
    store = run(cifar, half, tmp_path / "tokens")
    assert made_by(store, whole) and made_by(store, half) and not made_by(store, model)
    manifest = tmp_path / "tokens" / "manifest.json"
    earlier = json.loads(manifest.read_text()) | {"tokenizer_fingerprint": list(codes_fingerprints(half))[1]}
    manifest.write_text(json.dumps(earlier))  # as earlier versions wrote it
    store = run(cifar, half, tmp_path / "tokens")
    assert made_by(store, half) and not made_by(store, whole)
    assert json.loads(manifest.read_text()) == earlier
