"""`detailflow vary`, `encode` and `decode`."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detailflow import DetailFlowPipeline
from detailflow.cli import vary
from detailflow.cli.main import main
from detailflow.data.images import open_images
from detailflow.models.tokenizer import DetailFlowTokenizer
from detailflow.pipeline import fit
from detailflow.token_files import TokenFile


@pytest.fixture
def run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command of the tests' model in a folder of its own; return its status, output and error output."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> tuple[int, str, str]:
        given = [] if "--model" in argv else ["--model", str(model)]
        status = main([*map(str, argv), *given, "--device", "cpu"])
        return status, *capsys.readouterr()

    return run


def picture(name: str, size: tuple[int, int] = (90, 50)) -> Image.Image:
    image = Image.effect_noise(size, 60).convert("RGB")
    image.save(name)
    return image


def read(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def test_variations_are_those_of_the_pipeline(pipeline: DetailFlowPipeline, run: Any):
    images = {"a photo": picture("a photo.png"), "b": picture("b.bmp", (20, 20))}
    options = ("--keep", "4", "8", "--class", "cat", "Hot dog", "--num", "2", "--seed", "5", "--temperature", "0.9")
    status, out, err = run("vary", "a photo.png", "b.bmp", *options, "--output", "out")
    assert (status, out, err) == (
        0,
        "wrote 8 variations of each of 2 images to out, together in out/IMAGE-variations.png\n",
        "",
    )
    names = [f"{k}-{label}-{i}" for k in (4, 8) for label in ("cat", "Hot-dog") for i in (0, 1)]
    found = sorted(path.name for path in Path("out").iterdir())
    assert found == sorted(f"{name}-{rest}.png" for name in images for rest in [*names, "variations"])
    for name, image in images.items():
        for k in (4, 8):
            for label in ("cat", "Hot dog"):
                expected = pipeline.vary(image, keep=k, label=label, num_images=2, seed=5, temperature=0.9)
                for i, variation in enumerate(expected):
                    shown = read(f"out/{name}-{k}-{label.replace(' ', '-')}-{i}.png")
                    assert shown.tobytes() == variation.tobytes()
    assert len(open_images("out")) == 16  # the grids are not images of a set


def test_the_grid(pipeline: DetailFlowPipeline, run: Any):
    """A row for each number of tokens: the original, what they show, the variations."""
    image = picture("a.png")
    assert run("vary", "a.png", "--keep", "4", "12", "--class", "cat", "--num", "3")[0] == 0
    sheet = np.asarray(read("outputs/a-variations.png"))
    assert sheet.shape == (2 * (128 + 16 + 4) + 4, 5 * 132 + 4, 3)
    for row, k in enumerate((4, 12)):
        kept = pipeline.reconstruct(image, counts=[k])[0].images[0]
        tiles = [
            fit(pipeline.tokenizer.schedule, image),
            kept,
            *pipeline.vary(image, keep=k, label="cat", num_images=3),
        ]
        for column, tile in enumerate(tiles):
            left, top = 4 + 132 * column, 4 + 148 * row
            np.testing.assert_array_equal(sheet[top : top + 128 : 4, left : left + 128 : 4], np.asarray(tile))


def test_all_tokens_give_the_reconstruction(pipeline: DetailFlowPipeline, run: Any):
    image = picture("a.png")
    assert run("vary", "a.png", "--keep", "16", "--class", "bird", "--num", "1")[0] == 0
    whole = pipeline.reconstruct(image)[-1].images[0]
    assert read("outputs/a-16-bird-0.png").tobytes() == whole.tobytes()


def test_no_class_and_a_quarter_unless_told_otherwise(pipeline: DetailFlowPipeline, run: Any):
    image = picture("a.png")
    assert run("vary", "a.png")[1] == "wrote 4 variations of a to outputs, together in outputs/a-variations.png\n"
    for i, variation in enumerate(pipeline.vary(image, keep=4, num_images=4)):
        assert read(f"outputs/a-4-any-{i}.png").tobytes() == variation.tobytes()


def test_whole_images_and_their_tokens(pipeline: DetailFlowPipeline, run: Any):
    """Tokens from a file are varied as their image is, in its own shape."""
    picture("a.png")
    assert run("encode", "a.png", "--whole")[:2] == (0, "wrote 16 tokens of 1 image to tokens.npz\n")
    for source, output in (("a.png", "images"), ("tokens.npz", "tokens")):
        whole = ["--whole"] if source == "a.png" else []
        assert run("vary", source, *whole, "--keep", "8", "--class", "cat", "--num", "1", "--output", output)[0] == 0
    assert read("images/a-8-cat-0.png").size == (40, 24)
    assert read("images/a-8-cat-0.png").tobytes() == read("tokens/a-8-cat-0.png").tobytes()
    tile = np.asarray(read("tokens/a-variations.png"))[4 : 4 + 96 : 4, 4 : 4 + 160 : 4]  # in place of the original
    whole = pipeline.reconstruct(read("a.png"), whole=True)[-1].images[0]
    np.testing.assert_array_equal(tile, np.asarray(whole))


def test_encode_and_decode(pipeline: DetailFlowPipeline, run: Any):
    images = {"a": picture("a.png"), "b": picture("b.png", (40, 24)), "c": picture("c.png", (24, 40))}
    status, out, _ = run("encode", "a.png", "b.png", "c.png", "--output", "new/t.npz", "--whole")
    assert (status, out) == (0, "wrote 16 tokens of each of 3 images to new/t.npz\n")
    file = TokenFile.read(Path("new/t.npz"))
    assert file.names == ("a", "b", "c") and file.sizes.tolist() == [[24, 40], [24, 40], [40, 24]]
    assert file.fingerprint == pipeline.tokenizer.fingerprint()
    assert run("decode", "new/t.npz", "--num-tokens", "1", "16", "--output", "out")[1] == "wrote 6 images to out\n"
    for name, image in images.items():
        first, last = pipeline.reconstruct(image, counts=[1, 16], whole=True)
        assert read(f"out/{name}-16-tokens.png").tobytes() == last.images[0].tobytes()
        enlarged = read(f"out/{name}-1-tokens.png").resize(last.images[0].size, Image.Resampling.BICUBIC)
        assert enlarged.tobytes() == first.images[0].tobytes()
    assert run("decode", "new/t.npz", "--num-tokens", "1", "--full-size", "--output", "full")[0] == 0
    assert (
        read("full/a-1-tokens.png").tobytes()
        == pipeline.reconstruct(images["a"], counts=[1], whole=True)[0].images[0].tobytes()
    )


def test_the_first_tokens_alone(pipeline: DetailFlowPipeline, run: Any):
    image = picture("a.png")
    assert run("encode", "a.png", "--num-tokens", "8")[0] == 0
    assert TokenFile.read(Path("tokens.npz")).tokens.tolist() == [pipeline.tokens(image)[:8].tolist()]
    assert run("decode", "tokens.npz")[0] == 0
    assert read("outputs/a-8-tokens.png").size == (pipeline.tokenizer.schedule.decode_size(8),) * 2
    assert run("vary", "tokens.npz", "--keep", "8", "--num", "1")[0] == 0
    for command in (("decode", "tokens.npz", "--num-tokens", "12"), ("vary", "tokens.npz", "--keep", "12")):
        status, _, err = run(*command)
        assert status == 2 and f"{command[2]} must be at most the 8 tokens of tokens.npz, not 12" in err
    again = run("encode", "a.png", "--num-tokens", "2")
    assert again[:2] == (0, "wrote 2 tokens of 1 image to tokens.npz in place of 1 earlier file\n")
    status, _, err = run("vary", "tokens.npz")
    assert status == 2 and "--keep must be at most the 2 tokens of tokens.npz, not 4" in err


def test_all_images_of_a_folder(cifar: Path, pipeline: DetailFlowPipeline, run: Any):
    folder = cifar / "class0"
    files = sorted(folder.iterdir())
    assert run("encode", folder)[0] == 0
    file = TokenFile.read(Path("tokens.npz"))
    assert file.names == tuple(path.stem for path in files) and len(files) > 8
    assert file.tokens[5].tolist() == pipeline.tokens(read(str(files[5]))).tolist()
    status, _, err = run("vary", "tokens.npz", "--num", "1")
    assert status == 0 and len(list(Path("outputs").glob("*-variations.png"))) == 4
    assert f"tokens.npz: 4 of its {len(files)} images, evenly spread; --num-inputs {len(files)} takes all" in err


def test_an_unreadable_image_of_a_folder(run: Any):
    Path("photos").mkdir()
    for name in "abc":
        picture(f"photos/{name}.png")
    Path("photos/b.png").write_bytes(b"no image")
    assert run("encode", "photos")[0] == 0
    assert TokenFile.read(Path("tokens.npz")).names == ("a", "c")
    status, out, err = run("vary", "photos", "--num", "1")
    assert (status, out) == (
        0,
        "wrote 1 variation of each of 2 images to outputs, together in outputs/IMAGE-variations.png\n",
    )
    assert err.splitlines()[-1].startswith("left out: photos/b.png is ")


def test_another_model(run: Any, pipeline: DetailFlowPipeline, tmp_path: Path):
    picture("a.png")
    assert run("encode", "a.png", "--dtype", "bfloat16")[0] == 0
    for dtype in ("float32", "float16"):  # in another dtype it is the same tokenizer
        assert run("decode", "tokens.npz", "--dtype", dtype)[0] == 0
    for command in ("vary", "decode"):
        status, _, err = run(command, "tokens.npz", "--model", Path(__file__).parents[1] / "parity" / "tiny-32")
        assert status == 2 and "tokens.npz has the tokens of another tokenizer" in err and err.count("\n") == 1
    torch.manual_seed(1)  # the pipeline has the weights of 0
    other = DetailFlowTokenizer(pipeline.tokenizer.config)
    assert other.fingerprint() != pipeline.tokenizer.fingerprint()
    other.load_state_dict(pipeline.tokenizer.state_dict())
    with torch.no_grad():
        other.decoder.to_pixels.weight.neg_()
        assert other.fingerprint() == pipeline.tokenizer.fingerprint()  # the same tokens
        other.quantizer.codebook[0, 0].neg_()
    assert other.fingerprint() != pipeline.tokenizer.fingerprint()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("vary", "a.png", "--keep", "5"), "--keep must be 1 to 4 or a multiple of 4 up to 16, not 5"),
        (("vary", "a.png", "--class", "dgo"), "unknown class 'dgo'"),
        (("vary", "a.png", "--num", "0"), "--num must be"),
        (("vary", "a.png", "--num", "100000000"), "--num must be at most 100,000, not 100,000,000"),
        (("vary", "/dev/null"), "/dev/null is not a regular file, nor a folder: give an image file"),
        (("vary", "missing.png"), "missing.png does not exist"),
        (("vary", "a.png", "cat"), "cat is a class, not an image: put --class cat after the images"),
        (("vary", "a.png", "cat", "Hot dog"), "are classes, not images: put --class cat 'Hot dog' after the images"),
        (("vary", "missing.npz"), "could not read missing.npz"),
        (("vary", "fake.npz"), "fake.npz is damaged, or no token file"),
        (("vary",), "the following arguments are required: IMAGE"),
        (("vary", "--class", "cat", "a.png"), "a.png is taken for a value of --class: put IMAGE before --class"),
        (("vary", "--class", "cat", "--keep", "4", "a.png"), "value of --keep: put IMAGE before --class and --keep"),
        (("vary", "a.png", "--class", "cat", "a.png"), "a.png is taken for a value of --class: put IMAGE before"),
        (("vary", "--class", "cat", "b.png"), "are required: IMAGE: put IMAGE before --class"),
        (("decode", "--num-tokens", "4", "fake.npz"), "fake.npz is taken for a value of --num-tokens: put FILE before"),
        (("decode", "--num-tokens", "4", "b.npz"), "--num-tokens must be an integer, not 'b.npz': put FILE before"),
        (("decode", "a.png"), "a.png is damaged, or no token file of `detailflow encode`"),
        (("encode", "a.png", "--output", "fake.npz"), "fake.npz was not made by `detailflow encode`: move it"),
        (("encode", "a.png", "--output", "tokens.dat"), "--output must end in .npz, not 'tokens.dat'"),
        (("encode", "a.png", "--num-tokens", "7"), "--num-tokens must be 1 to 4"),
        (("encode", "missing.png"), "missing.png does not exist"),
    ],
)
def test_mistakes(argv: tuple[str, ...], message: str, run: Any):
    picture("a.png")
    Path("fake.npz").write_bytes(b"a user's own")
    status, out, err = run(*argv)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err
    assert sorted(path.name for path in Path().iterdir()) == ["a.png", "fake.npz"]
    assert Path("fake.npz").read_bytes() == b"a user's own"


def test_images_behind_options_of_one_value(run: Any):
    picture("a.png")
    Path("cat").mkdir()  # not the folder, but the class
    assert run("vary", "--class=cat", "--num", "1", "a.png")[0] == 0
    assert run("vary", "a.png", "--class", "cat", "--num", "1")[0] == 0
    assert vary.parser().parse_args(["--class", "cat", "--", "a.png"]).images == ["a.png"]
    picture("cat/b.png")
    assert run("vary", "cat", "--class", "cat", "--num", "1")[:2] == (
        0,
        "wrote 1 variation of b to outputs, together in outputs/b-variations.png\n",
    )


def test_no_pipe_and_no_folder_is_replaced(run: Any):
    picture("a.png")
    assert run("encode", "a.png")[0] == 0
    os.mkfifo("pipe.npz")
    status, _, err = run("encode", "a.png", "--output", "pipe.npz")
    assert status == 2 and "pipe.npz was not made by `detailflow encode`: move it, or choose another output" in err
    for command, name in (("decode tokens.npz", "a-16-tokens.png"), ("vary a.png --num 1", "a-4-any-0.png")):
        for make, remove in ((os.mkfifo, os.unlink), (os.mkdir, os.rmdir)):
            make(name)
            status, _, err = run(*command.split(), "--output", ".")
            assert status == 2 and f"{name} was not made by `detailflow {command.split()[0]}`: move it" in err
            remove(name)  # it is still there
    assert sorted(path.name for path in Path().iterdir()) == ["a.png", "pipe.npz", "tokens.npz"]


def test_no_file_of_the_users_own_is_replaced(run: Any):
    picture("a.png")
    for name in ("a-4-any-0.png", "a-variations.png"):
        before = picture(f"{name}").tobytes()
        status, _, err = run("vary", "a.png", "--num", "1", "--output", ".")
        assert status == 2 and f"{name} was not made by `detailflow vary`: move it" in err
        assert read(name).tobytes() == before
        Path(name).unlink()
    assert run("vary", "a.png", "--num", "1")[:2] == (
        0,
        "wrote 1 variation of a to outputs, together in outputs/a-variations.png\n",
    )
    again = run("vary", "a.png", "--num", "1")  # its own it replaces
    assert again[:2] == (
        0,
        "wrote 1 variation of a to outputs, together in outputs/a-variations.png in place of 2 earlier files\n",
    )
    picture("b.png")
    assert run("vary", "b.png", "outputs/a-4-any-0.png", "--num", "1")[0] == 0
    assert run("vary", "a.png", "outputs/a-4-any-0.png", "--num", "1")[0] == 2
