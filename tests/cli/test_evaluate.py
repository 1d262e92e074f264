"""`detailflow evaluate`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detailflow.cli.main import main
from detailflow.evaluation.report import load


@pytest.fixture
def network(feature_file: Path) -> Path:
    return feature_file


def evaluate(*argv: object) -> int:
    return main(["evaluate", *map(str, argv)])


def figures(folder: Path, section: int = 0) -> list[dict[str, Any]]:
    """The figures of every row of a report's section."""
    rows = load(folder)["sections"][section]["rows"]
    return [{name: figure["value"] for name, figure in row["figures"].items()} for row in rows]


@pytest.mark.parametrize("what", [[], ["tokenizer"], ["gpt"], ["samples"], ["statistics"], ["compare"]])
@pytest.mark.parametrize("columns", ["80", "300"])
def test_help_fits_a_screen(
    what: list[str], columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", columns)
    if what:
        with pytest.raises(SystemExit) as stopped:
            evaluate(*what, "--help")
        assert stopped.value.code == 0
    else:
        assert evaluate() == evaluate("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    if what == ["gpt"]:
        named = [line.split()[0] for line in lines if line.startswith(("  --", "sampling", "measures", "model"))]
        sampling = named[named.index("sampling") : named.index("measures")]
        assert "--num-tokens" in sampling and "--features" not in sampling and "--output" not in sampling
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 98


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from detailflow.cli.main import main\n"
        "try: main(['evaluate', 'gpt', '--help'])\n"
        "finally: assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_tokenizer(model: Path, cifar: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = [
        "tokenizer", "--model", model, "--data", cifar, "--num-images", 30, "--num-tokens", 4, 16,
        "--mistakes-at", "g1", "--features", network, "--lpips", "none", "--device", "cpu",
        "--output", tmp_path / "out",
    ]  # fmt: skip
    assert evaluate(*argv) == 0
    out = capsys.readouterr().out
    assert "| tokens | side | PSNR, dB | SSIM |" in out
    assert "FD is the Fréchet distance of the features of" in out  # what the report warns of is said here as well
    assert out.endswith(f"wrote {tmp_path / 'out' / 'report.md'}\n")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.json", "report.md", "quality-by-tokens.png", "reconstructions.png"}
    provenance = load(tmp_path / "out")["provenance"]
    assert provenance["command"].split()[:5] == ["detailflow", "evaluate", "tokenizer", "--model", str(model)]
    assert provenance["models"]["tokenizer"]["name"] == str(model)
    assert len(provenance["models"]["tokenizer"]["fingerprint"]) == 64
    assert provenance["features"]["network"] == "tiny.safetensors"
    assert provenance["machine"]["processes"] == 1
    assert {"command", "date", "models", "data", "features", "preprocessing", "settings", "machine", "versions"} == set(
        provenance
    )
    typed = {str(word) for word in argv}
    for name, value in _flat(provenance):
        assert value in typed or name == "command" or not value.startswith("/"), (name, value)

    before = (tmp_path / "out" / "report.json").read_bytes()
    assert evaluate(*argv, "--seed", 1) == 2
    assert "out has the report of another evaluation (detailflow evaluate tokenizer " in capsys.readouterr().err
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    first = figures(tmp_path / "out")
    assert evaluate(*argv) == 0  # the same again
    assert figures(tmp_path / "out") == first


def test_more_samples_go_on_with_the_kept_ones(
    model: Path, cifar: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = ["--model", model, "--reference", cifar, "--features", network, "--device", "cpu", "--batch-size", 3]
    argv += ["--output", tmp_path / "out"]
    assert evaluate("gpt", *argv, "--num-samples", 6, "--keep-samples") == 0
    (kept,) = (tmp_path / "out" / "samples").glob("*/samples.npz")
    before = np.load(kept)["arr_0"]
    assert evaluate("gpt", *argv, "--num-samples=9", "--keep-samples") == 0
    after = np.load(kept)["arr_0"]
    assert len(after) == 9 and (after[:6] == before).all()
    assert load(tmp_path / "out")["provenance"]["data"]["samples"]["images"] == 9
    capsys.readouterr()
    for other in (
        ["--num-samples", 8, "--keep-samples"],
        ["--num-samples", 12],
        ["--num-samples", 12, "--keep-samples", "--seed", 1],
    ):
        assert evaluate("gpt", *argv, *other) == 2
        error = capsys.readouterr().err
        assert "out has the report of another evaluation (" in error
        assert error.endswith("): choose another folder, or remove report.json\n")


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat(item, key)]
    return [(name, str(value))]


def test_without_features(model: Path, cifar: Path, tmp_path: Path):
    argv = ["--data", cifar, "--num-images", 5, "--features", "none", "--lpips", "none", "--device", "cpu"]
    assert evaluate("tokenizer", "--model", model, *argv, "--output", tmp_path / "out") == 0
    rows = figures(tmp_path / "out")
    assert len(rows) == 5
    assert all(set(row) - {"blockiness"} == {"PSNR", "SSIM"} for row in rows)
    assert ["blockiness" in row for row in rows] == [False, False, False, False, True]
    again = [
        *argv,
        "--num-tokens",
        4,
        16,
        "--size",
        32,
        8,
        "--output",
        tmp_path / "sizes",
    ]  # only half of the rows have it
    assert evaluate("tokenizer", "--model", model, *again) == 0
    assert ["blockiness" in row for row in figures(tmp_path / "sizes")] == [True, False, True, False]


def test_gpt_then_its_samples_then_both_compared(
    model: Path, cifar: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    common = ["--features", network, "--device", "cpu"]
    sweep = ["--guidance-scale", 1, 3, "--top-k", 20, "off", "--seeds", 5, "--keep-samples"]
    argv = ["--model", model, "--reference", cifar, "--num-samples", 25, *sweep, *common]
    assert evaluate("gpt", *argv, "--output", tmp_path / "gpt") == 0
    report = load(tmp_path / "gpt")
    settings = [(row["setting"]["guidance"], row["setting"]["top-k"]) for row in report["sections"][0]["rows"]]
    assert settings == [(1.0, 20), (1.0, "off"), (3.0, 20), (3.0, "off")]
    assert (tmp_path / "gpt" / "by-guidance.png").exists()
    assert set(report["provenance"]["models"]) == {"tokenizer", "gpt"}
    (kept,) = (tmp_path / "gpt" / "samples").glob("guidance-3-*-top-k-20-*-seed-5")
    assert "wrote" not in capsys.readouterr().out.replace("wrote " + str(tmp_path / "gpt" / "report.md"), "")

    assert evaluate("samples", kept / "samples.npz", cifar, *common, "--output", tmp_path / "samples") == 0
    (row,) = figures(tmp_path / "samples")
    ours = figures(tmp_path / "gpt")[2]
    assert row["FD"] == pytest.approx(ours["gFD"], rel=1e-6)
    assert (row["IS"], row["precision"], row["recall"]) == pytest.approx(
        (ours["IS"], ours["precision"], ours["recall"])
    )

    capsys.readouterr()
    assert evaluate("compare", tmp_path / "gpt", tmp_path / "gpt" / "report.json") == 0
    out = capsys.readouterr().out
    assert out.count("| equal |") == 4 * 5
    assert evaluate("compare", tmp_path / "gpt", tmp_path / "samples") == 2
    assert "is a report of gpt and" in capsys.readouterr().err


def test_a_reference_measured_once(cifar: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stored, common = tmp_path / "stored.npz", ("--features", network, "--device", "cpu")
    assert evaluate("statistics", cifar, *common, "--size", 32, "--num-images", 20, "--output", stored) == 0
    for name, reference in (("a", stored), ("b", cifar)):
        assert (
            evaluate(
                "samples", cifar, reference, *common, "--size", 32, "--num-images", 20, "--output", tmp_path / name
            )
            == 0
        )
    (once,), (all_of_them,) = figures(tmp_path / "a"), figures(tmp_path / "b")
    assert once["FD"] == pytest.approx(0, abs=1e-6) and all_of_them["FD"] > 1e-3
    assert once["precision"] == once["recall"] == 1
    capsys.readouterr()
    for output, problem in ((stored, "exists already"), (tmp_path / "stored", "is not named so")):
        assert evaluate("statistics", cifar, *common, "--output", output) == 2
        assert f"--output must be a new .npz file, and {output} {problem}" in capsys.readouterr().err


def test_a_reference_of_another_size(cifar: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its features are of other pictures: the distance of a set from itself was not 0, without a word."""
    stored, common = tmp_path / "stored.npz", ("--features", network, "--device", "cpu")
    assert evaluate("statistics", cifar, *common, "--size", 16, "--output", stored) == 0
    for size in ((), ("--size", 32)):
        assert evaluate("samples", cifar, stored, *common, *size, "--output", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert f"{stored} has " in error and "images of 16×16 pixels" in error
    assert not (tmp_path / "out" / "report.json").exists()
    assert evaluate("samples", cifar, stored, *common, "--size", 16, "--output", tmp_path / "out") == 0
    assert figures(tmp_path / "out")[0]["FD"] == pytest.approx(0, abs=1e-6)


def test_a_report_is_not_written_among_the_images(
    cifar: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Its pictures would be images of the set."""
    images = Path(shutil.copytree(cifar, tmp_path / "images"))
    common = ("--features", network, "--device", "cpu", "--output")
    for sets in ((images, cifar), (cifar, images)):
        for output in (images, images / "class0" / "report"):
            assert evaluate("samples", *sets, *common, output) == 2
            assert f"your data{'' if output == images else f', {images}'}: choose" in capsys.readouterr().err
    assert sorted(images.rglob("*.p*")) == [images / path.relative_to(cifar) for path in sorted(cifar.rglob("*.p*"))]


def test_a_set_that_is_not_finished(
    cifar: Path, model: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    made = tmp_path / "made"
    command = ["generate", "--model", str(model), "--num-images", "24", "--device", "cpu", "--output", str(made)]
    assert main(command) == 0
    last = max(made.glob("*.png"))
    last.rename(tmp_path / "last.png")
    argv = ["samples", made, cifar, "--features", network, "--device", "cpu", "--output", tmp_path / "out"]
    assert evaluate(*argv) == 2
    assert "made has 23 of its 24 images: repeat the `detailflow generate`" in capsys.readouterr().err
    (tmp_path / "last.png").rename(last)
    (made / "0.png").write_bytes(last.read_bytes())
    assert evaluate(*argv) == 2
    (made / "0.png").unlink()
    assert main(["evaluate", "samples", str(made), str(made), *map(str, argv[3:])]) == 0


def test_a_growing_set_in_one_file_that_is_not_finished(
    cifar: Path, model: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    made = tmp_path / "made"
    command = ["generate", "--model", str(model), "--format", "npz", "--device", "cpu", "--output", str(made)]
    assert main([*command, "--num-images", "12"]) == 0
    record = json.loads((made / "samples.json").read_text())
    (made / "samples.json").write_text(json.dumps(record | {"num_images": 24}))  # as a stopped call of 24 leaves it
    argv = ("--features", network, "--device", "cpu", "--output", tmp_path / "out")
    assert evaluate("samples", made, cifar, *argv) == 2
    assert "made has 12 of its 24 images: repeat" in capsys.readouterr().err


def test_two_sets_of_other_sizes(cifar: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from PIL import Image

    noise = tmp_path / "noise"
    noise.mkdir()
    for i in range(12):
        Image.effect_noise((40, 48), 60 + i).convert("RGB").save(noise / f"{i}.png")
    argv = ["samples", noise, cifar, "--features", network, "--device", "cpu", "--output", tmp_path / "out"]
    assert evaluate(*argv) == 2
    assert (
        f"{noise} has images of 40×48 pixels and {cifar} has images of 32×32 pixels: give a size (--size) for both"
        in capsys.readouterr().err
    )
    assert evaluate(*argv, "--size", 32) == 0
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.size == (8 * 132 + 4, 2 * 132 + 4)
    assert not (tmp_path / "out" / ".lock").exists()
    (row,) = figures(tmp_path / "out")
    assert row["FD"] > 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "too few" not in text  # six features need no more than twelve images
    crop = "shorter side to 32 pixels (bicubic with antialiasing), centre crop; .npz as they are"
    assert f"| preprocessing.images | {crop} |" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("everything", "unknown evaluation 'everything': give tokenizer, gpt, samples, statistics, compare"),
        ("smaples", "unknown evaluation 'smaples': did you mean samples?"),
        ("tokenizer --output OUT", "the following arguments are required: --data"),
        ("tokenizer --data nowhere/at.parquet --output OUT", "nowhere/at.parquet does not exist"),
        ("tokenizer --data CIFAR", "the following arguments are required: --output"),
        ("tokenizer --data CIFAR --output OUT --features clip", "features must be inception, dinov2, "),
        ("tokenizer --data CIFAR --output OUT --num-tokens 5", "num_tokens must be 1"),
        ("tokenizer --data CIFAR --output OUT --mistakes-at g9", "mistakes can be planted at token 0 to 15"),
        ("tokenizer --data CIFAR --output OUT --num-images 500", "has 200 images: 500 cannot be taken"),
        (
            "tokenizer --data CIFAR --output OUT --features none --lpips none --seed -1",
            "--seed must be 0 to 2^64 - 1, not -1",
        ),
        (
            "tokenizer --data CIFAR --output OUT --features none --lpips none --reference CIFAR",
            "a reference is for Fréchet distances: give features",
        ),
        (
            "tokenizer --data CIFAR --output OUT --features none --lpips none --weights CIFAR",
            "--features none needs no weights: leave out --weights",
        ),
        ("gpt --reference CIFAR --output OUT --labels all --features NET", "labels must be balanced"),
        ("gpt --reference CIFAR --output OUT --num-samples 1 --features NET", "too few images to"),
        ("gpt --reference CIFAR --output OUT --top-k few", "--top-k must be an integer, 0 or more (0 is off), not"),
        ("gpt --reference CIFAR --output OUT --top-k -1 --features NET", "--top-k must be 0 or more (0 is off)"),
        ("gpt --reference NPZ --output OUT", "has images of 16×8 pixels, and not of 32×32"),
    ],
)
def test_bad_input(
    argv: str,
    message: str,
    model: Path,
    cifar: Path,
    network: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    import numpy as np

    np.savez(tmp_path / "small.npz", arr_0=np.zeros((4, 8, 16, 3), np.uint8))
    places = {"CIFAR": cifar, "OUT": tmp_path / "out", "NET": network, "NPZ": tmp_path / "small.npz"}
    words = argv.split()
    options = ["--model", model, "--device", "cpu"] if words[0] in ("tokenizer", "gpt") else []
    assert evaluate(*(places.get(word, word) for word in words), *options) == 2
    out, err = capsys.readouterr()
    assert out == "" or (out.startswith(f"{cifar}: 200 images in 10 classes (class0 16, ") and out.count("\n") == 1)
    assert message in err
    assert err.startswith("detailflow: error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(model: Path, cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert (
            evaluate("tokenizer", "--model", model, "--data", cifar, "--output", tmp_path / "out", "--device", "cpu")
            == 2
        )
    assert "detailflow evaluate needs the package matplotlib: install it with pip install" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tokenizer", "gpt"])
def test_two_processes_measure_what_one_does(
    what: str, model: Path, cifar: Path, network: Path, torchrun: list[str], tmp_path: Path
):
    if what == "tokenizer":
        argv = ["--data", cifar, "--num-images", 31, "--num-tokens", 4, 16, "--mistakes-at", "g1", "--lpips", "none"]
    else:
        argv = ["--reference", cifar, "--num-samples", 31, "--seeds", 0, 1, "--labels", "random"]
    command = ["evaluate", what, "--model", model, *argv, "--features", network, "--batch-size", 8, "--device", "cpu"]
    assert main([*map(str, command), "--output", str(tmp_path / "one")]) == 0
    done = subprocess.run(
        [*torchrun, "-m", "detailflow", *map(str, command), "--output", str(tmp_path / "two")],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert one["provenance"]["data"] == two["provenance"]["data"]
    assert (one["provenance"]["machine"]["processes"], two["provenance"]["machine"]["processes"]) == (1, 2)
    for ours, theirs in zip(one["sections"], two["sections"], strict=True):
        for a, b in zip(ours["rows"], theirs["rows"], strict=True):
            assert a["setting"] == b["setting"]
            for name, figure in a["figures"].items():
                # Other batches may round other pixels up or down.
                assert figure["value"] == pytest.approx(b["figures"][name]["value"], rel=2e-3), name
