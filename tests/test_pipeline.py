"""From labels and images to images: determinism, stages, labels and errors."""

import copy
import gc
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detailflow import DetailFlowError, DetailFlowGPT, DetailFlowPipeline, DetailFlowTokenizer
from detailflow.data.transforms import center_crop
from detailflow.device import choose_device, within_memory
from detailflow.errors import DetailFlowWarning
from detailflow.generation import Engine, image_generator

NOISE = {(0, 0): [0.3904639972043583, 0.30718335883949344], (2**40, 7): [0.5825745527585999, 0.6969457588092554]}


def as_bytes(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


# ------------------------------------------------------------------------------------------------- generation


def test_images_come_in_the_order_of_the_labels(pipeline: DetailFlowPipeline):
    images = pipeline(["cat", 0], num_images_per_class=2, seed=3)
    assert [image.size for image in images] == [(32, 32)] * 4
    assert all(image.mode == "RGB" for image in images)
    assert as_bytes(pipeline([3, 3, "airplane", "AIRPLANE"], seed=3)) == as_bytes(images)
    assert len(set(as_bytes(images))) == 4


def test_the_seed_decides(pipeline: DetailFlowPipeline):
    first = as_bytes(pipeline("cat", num_images_per_class=3, seed=1))
    assert as_bytes(pipeline("cat", num_images_per_class=3, seed=1)) == first
    assert not set(first) & set(as_bytes(pipeline("cat", num_images_per_class=3, seed=2)))
    assert as_bytes(pipeline("cat", num_images_per_class=3)) == as_bytes(
        pipeline("cat", num_images_per_class=3, seed=0)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_torchs_default_dtype_changes_nothing(dtype: torch.dtype, shipped: DetailFlowPipeline):
    """Programs set it for the models that they make themselves."""
    picture = Image.radial_gradient("L").resize((32, 32)).convert("RGB")

    def made(pipeline: DetailFlowPipeline) -> list[Image.Image]:
        whole = pipeline("cat", seed=1) + pipeline.vary(picture, keep=16, label="cat", num_images=2, seed=3)
        return whole + [
            list(stages)[-1].images[0] for stages in (pipeline.stream("dog"), pipeline.reconstruct(picture))
        ]

    wanted = made(shipped)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = made(DetailFlowPipeline.from_pretrained(device="cpu"))
    finally:
        torch.set_default_dtype(before)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(found, wanted, strict=True))


def test_weights_that_are_too_large(shipped: DetailFlowPipeline):
    """Finite in the file, but not what comes of them: black images otherwise, and tokens of zeros."""
    picture, tokenizer = Image.new("RGB", (32, 32), "teal"), copy.deepcopy(shipped.tokenizer)
    broken = DetailFlowPipeline(tokenizer, shipped.gpt)
    with torch.no_grad():
        tokenizer.decoder.norm.weight.mul_(3e38)
        with pytest.raises(DetailFlowError, match="the decoder's pixels are not finite: its weights are damaged, or"):
            broken("cat")
        tokenizer.encoder.norm.weight.mul_(3e38)
        with pytest.raises(DetailFlowError, match="the encoder's latents are not finite: its weights are damaged, or"):
            broken.tokens(picture)
        with pytest.raises(DetailFlowError, match="the encoder's latents are not finite"):
            tokenizer.encode_correction(torch.zeros(1, 3, 32, 32), position=0, wrong_tokens=torch.tensor([[3]]))


def test_torchs_own_random_numbers_are_left_alone(pipeline: DetailFlowPipeline):
    state = torch.get_rng_state()
    pipeline("cat", seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_does_not_depend_on_its_batch(pipeline: DetailFlowPipeline):
    labels = [0, 1, 2, 3, 4]
    images = [np.asarray(image, np.int16) for image in pipeline(labels, seed=5)]
    for batch_size in (1, 2, 3):
        for image, expected in zip(pipeline(labels, seed=5, batch_size=batch_size), images, strict=True):
            assert np.abs(np.asarray(image) - expected).max() <= 1  # floating-point rounding
    alone = pipeline([3], seed=5, first_image=3)[0]
    assert np.abs(np.asarray(alone) - images[3]).max() <= 1
    other_company = pipeline([4, 4, 4, 3], seed=5)[3]
    assert np.abs(np.asarray(other_company) - images[3]).max() <= 1


def test_the_noise_of_an_image_stays_what_it_is():
    assert torch.rand(2, generator=image_generator(0, 0), dtype=torch.float64).tolist() == NOISE[0, 0]
    assert torch.rand(2, generator=image_generator(2**40, 7), dtype=torch.float64).tolist() == NOISE[2**40, 7]


@pytest.mark.parametrize("batch_size", [2, 32])
def test_a_stream_ends_with_the_images_of_the_plain_call(pipeline: DetailFlowPipeline, batch_size: int):
    options = dict(
        num_images_per_class=3, guidance_scale=2.0, guidance_schedule="linear", seed=9, batch_size=batch_size
    )
    stages = list(pipeline.stream(["cat", "bird"], **options))
    schedule = pipeline.tokenizer.schedule
    assert tuple(stage.num_tokens for stage in stages) == schedule.valid_counts
    for stage in stages:
        assert stage.size == schedule.decode_size(stage.num_tokens)
        assert [image.size for image in stage.images] == [(stage.size, stage.size)] * 6
    assert as_bytes(stages[-1].images) == as_bytes(pipeline(["cat", "bird"], **options))


def test_a_keyword_that_is_none(pipeline: DetailFlowPipeline):
    with pytest.raises(TypeError, match="unknown argument 'num_images_per_clas': did you mean num_images_per_class"):
        pipeline("cat", num_images_per_clas=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_stream_holds_the_caches_of_one_batch(pipeline: DetailFlowPipeline, batch_size: int):
    """Those of 1,000 labels of GPT-L would take 25 GB at once."""
    held: list[int] = []

    def look(_: int) -> None:
        held.append(sum(isinstance(thing, Engine) for thing in gc.get_objects()))

    gc.collect()
    stages = pipeline.stream([0, 1, 2, 3, 4], num_tokens=2, batch_size=batch_size, progress=look)
    assert [len(stage.images) for stage in stages] == [5, 5]
    assert len(held) == 2 * -(-5 // batch_size) and max(held) == 1


def test_a_stream_of_one_batch_comes_as_tokens_arrive(pipeline: DetailFlowPipeline):
    steps: list[int] = []
    for i, _ in enumerate(pipeline.stream([0, 1], progress=steps.append)):
        assert steps == [2] * (i + 1)


def test_a_stream_of_chosen_stages(pipeline: DetailFlowPipeline):
    stages = list(pipeline.stream(["cat"], counts=[2, 16]))
    assert [stage.num_tokens for stage in stages] == [2, 16]
    assert as_bytes(stages[-1].images) == as_bytes(pipeline(["cat"]))


def test_fewer_tokens_are_the_stage_of_so_many(pipeline: DetailFlowPipeline):
    stages = {stage.num_tokens: stage for stage in pipeline.stream(["cat"], num_images_per_class=2)}
    for n in (1, 4, 8):
        assert as_bytes(pipeline(["cat"], num_images_per_class=2, num_tokens=n)) == as_bytes(stages[n].images)


def test_progress_counts_every_step_of_every_image(pipeline: DetailFlowPipeline):
    steps: list[int] = []
    pipeline(["cat"], num_images_per_class=5, batch_size=3, progress=steps.append)
    assert steps == [3] * 7 + [2] * 7  # 4 single tokens, then 3 groups


def test_sampling_options_have_their_effect(pipeline: DetailFlowPipeline):
    greedy = as_bytes(pipeline(["cat"], temperature=0))
    assert greedy == as_bytes(pipeline(["cat"], temperature=0, seed=1))
    assert greedy == as_bytes(pipeline(["cat"], top_k=1))
    assert greedy != as_bytes(pipeline(["cat"]))
    assert as_bytes(pipeline(["cat"], guidance_scale=4.0)) != as_bytes(pipeline(["cat"]))
    assert as_bytes(pipeline(["cat"], guidance_scale=1.5)) == as_bytes(pipeline(["cat"]))  # the model's own


# ------------------------------------------------------------------------------------------------- labels and errors


def test_labels(pipeline: DetailFlowPipeline):
    assert pipeline.class_ids(["CAT", " hot DOG ", "2", 1, np.int64(0)]) == [3, 4, 2, 1, 0]
    assert pipeline.class_ids("bird") == [2]
    assert pipeline.class_ids(torch.tensor([1, 2])) == [1, 2]
    assert pipeline.class_ids(np.int64(3)) == pipeline.class_ids(torch.tensor(3)) == [3]
    assert [pipeline.class_name(i) for i in (3, 4)] == ["cat", "Hot dog"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["catt"], "unknown class 'catt': did you mean cat?"),
        (["hotdog"], "did you mean Hot dog?"),
        (["zebra"], "unknown class 'zebra': the classes are airplane, automobile, bird, cat, Hot dog"),
        ([5], "unknown class 5: the numbers are 0 to 4"),
        ([-1], "unknown class -1"),
        (["17"], "unknown class 17: the numbers are 0 to 4"),
        ([], "at least one class label"),
        (True, "a class label must be a number or a name, not True"),
    ],
)
def test_unknown_labels(pipeline: DetailFlowPipeline, labels: list[str | int], message: str):
    with pytest.raises(DetailFlowError) as caught:
        pipeline(labels)
    assert message in str(caught.value)


def renamed(pipeline: DetailFlowPipeline, names: tuple[str, ...] | None) -> DetailFlowPipeline:
    gpt = DetailFlowGPT(replace(pipeline.gpt.config, class_names=names))
    return DetailFlowPipeline(pipeline.tokenizer, gpt)


def test_a_name_that_two_classes_have(pipeline: DetailFlowPipeline):
    twins = renamed(pipeline, ("crane", "bird", "Crane", "cat", "dog"))
    assert twins.class_ids(["crane", "Crane"]) == [0, 2]  # as they are written
    with pytest.raises(DetailFlowError, match="2 classes are called 'CRANE': give the number, one of"):
        twins.class_ids("CRANE")


def test_numbers_as_names(pipeline: DetailFlowPipeline):
    """A class's number is not taken for the name of another on its way to the images."""
    numbered = renamed(pipeline, ("0", "1", "10", "2", "3"))
    numbered.gpt.load_state_dict(pipeline.gpt.state_dict())
    numbered.gpt.eval()
    assert numbered.class_ids(["2", "10", 3]) == [3, 2, 3]
    assert as_bytes(numbered(["2", "10"], seed=1)) == as_bytes(pipeline([3, 2], seed=1))
    assert as_bytes(numbered(numbered.class_ids(["2", "10"]), seed=1)) == as_bytes(pipeline([3, 2], seed=1))


def test_classes_without_names(pipeline: DetailFlowPipeline):
    nameless = renamed(pipeline, None)
    assert nameless.class_ids(["3", 4]) == [3, 4]
    assert nameless.class_name(3) == "3"
    with pytest.raises(DetailFlowError, match="no names, only the numbers 0 to 4"):
        nameless.class_ids("cat")


@pytest.mark.parametrize(
    "options",
    [
        {"seed": -1},
        {"seed": 2**64},
        {"num_images_per_class": 0},
        {"num_images_per_class": True},
        {"batch_size": 0},
        {"first_image": -1},
        {"num_tokens": 5},
        {"num_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"guidance_scale": -1.0},
        {"guidance_schedule": "cosine"},
        {"progress": 5},
        {"generator": 5},
        {"generator": [5]},
        {"generator": np.random.default_rng(0)},
    ],
)
def test_values_out_of_range(pipeline: DetailFlowPipeline, options: dict[str, int]):
    (name,) = options
    with pytest.raises(DetailFlowError, match=name):
        pipeline(["cat"], **options)
    with pytest.raises(DetailFlowError, match=name):
        pipeline.stream(["cat"], **options)  # at once, not at the first stage


def test_generators_in_place_of_a_seed(pipeline: DetailFlowPipeline):
    own = [image_generator(3, i) for i in range(4)]
    wanted = as_bytes(pipeline(["cat", 0], num_images_per_class=2, seed=3))
    assert as_bytes(pipeline(["cat", 0], num_images_per_class=2, generator=own, batch_size=3)) == wanted
    one = [as_bytes(pipeline([1, 2], generator=torch.Generator().manual_seed(s))) for s in (5, 5, 6)]
    assert one[0] == one[1] != one[2]
    with pytest.raises(DetailFlowError, match="generator must be one or a list of 2, one per image, not a list of 4"):
        pipeline([1, 2], generator=own)
    with pytest.raises(TypeError, match="unknown argument 'sed': did you mean seed"):
        pipeline("cat", sed=1)


def test_more_images_than_one_call_makes(pipeline: DetailFlowPipeline):
    for call in (pipeline, pipeline.stream):
        with pytest.raises(
            DetailFlowError, match="2,000,000,000 images are more than one call makes, which is 100,000: make"
        ):
            call(["cat", "bird"], num_images_per_class=10**9)
        with pytest.raises(DetailFlowError, match="num_images_per_class must be at most 2,147,483,647"):
            call(["cat", "bird"], num_images_per_class=10**11)


def test_what_does_not_fit_in_memory():
    message = "a batch of 5 images does not fit in memory, so give a smaller batch_size"
    with (
        pytest.raises(DetailFlowError, match=message),
        within_memory("a batch of 5 images", "give a smaller batch_size"),
    ):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="anything else"), within_memory("a", "b"):
        raise RuntimeError("anything else")


def test_the_largest_seed(pipeline: DetailFlowPipeline):
    assert len(pipeline(["cat"], seed=2**64 - 1)) == 1


@pytest.mark.parametrize(
    ("key", "value"), [("num_tokens", 32), ("group_size", 8), ("causal_tokens", 8), ("codebook_size", 65)]
)
def test_models_that_do_not_fit_together(pipeline: DetailFlowPipeline, key: str, value: int):
    causal = {"causal_tokens": 8} if key == "group_size" else {}
    gpt = DetailFlowGPT(replace(pipeline.gpt.config, **{key: value} | causal))
    with pytest.raises(DetailFlowError, match=f"do not fit together: {key} is"):
        DetailFlowPipeline(pipeline.tokenizer, gpt)


def test_an_ar_model_knows_its_tokenizer(pipeline: DetailFlowPipeline):
    """In any precision; a decoder that was trained further has the same codes."""
    gpt = copy.copy(pipeline.gpt)
    gpt.config = replace(gpt.config, tokenizer=pipeline.tokenizer.fingerprint())
    rounded = copy.deepcopy(pipeline.tokenizer).to(torch.bfloat16)
    rounded.decoder.to_pixels.bias.data += 1
    for tokenizer in (pipeline.tokenizer, rounded):
        with warnings.catch_warnings(action="error"):
            DetailFlowPipeline(tokenizer, gpt)
    torch.manual_seed(1)
    with pytest.warns(DetailFlowWarning, match="trained on the codes of another tokenizer"):
        DetailFlowPipeline(DetailFlowTokenizer(pipeline.tokenizer.config), gpt)


# ------------------------------------------------------------------------------------------------- loading and saving


def test_saved_and_loaded(pipeline: DetailFlowPipeline, model: Path):
    loaded = DetailFlowPipeline.from_pretrained(model, device="cpu")
    assert loaded.gpt.config == pipeline.gpt.config
    assert loaded.tokenizer.config == pipeline.tokenizer.config
    assert as_bytes(loaded(["cat"], seed=4)) == as_bytes(pipeline(["cat"], seed=4))
    assert isinstance(DetailFlowTokenizer.from_pretrained(str(model)), DetailFlowTokenizer)


def test_what_saving_does_not_replace(pipeline: DetailFlowPipeline, model: Path, tmp_path: Path):
    """As `convert`: a model of the same kind is replaced, others and training runs are not, nor hidden."""
    pair, one, published = Path(shutil.copytree(model, tmp_path / "pair")), tmp_path / "one", tmp_path / "published"
    pipeline.save_pretrained(pair)
    pipeline.tokenizer.save_pretrained(pair / "tokenizer")
    pipeline.tokenizer.save_pretrained(one)
    shutil.copytree(Path(__file__).parent / "parity" / "tiny-32", published)
    (pair / "gpt" / "resume").mkdir()
    (pair / "gpt" / "run.yaml").write_text("kind: gpt\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for save, folder, message in (
        (pipeline.save_pretrained, one, "already holds a model, which would hide a pair inside"),
        (pipeline.gpt.save_pretrained, pair, "holds a pair of models, which another would hide"),
        (pipeline.gpt.save_pretrained, one, "one holds a tokenizer, not an AR model"),
        (pipeline.save_pretrained, published, "already holds a model in the other layout"),
        (pipeline.gpt.save_pretrained, pair / "gpt", "holds a training run, whose model this would replace"),
    ):
        with pytest.raises(DetailFlowError, match=message):
            save(folder)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_place_that_is_none(pipeline: DetailFlowPipeline):
    for model in (pipeline, pipeline.tokenizer):
        with pytest.raises(DetailFlowError, match="^folder must be a path, not None$"):
            model.save_pretrained(None)  # type: ignore[arg-type]
        with pytest.raises(
            DetailFlowError, match=r"^could not write the model to a\\x00b.*: .*embedded null (byte|character in path)$"
        ):
            model.save_pretrained("a\0b")


def test_the_published_layout():
    folder = Path(__file__).parent / "parity" / "tiny-32"
    images = DetailFlowPipeline.from_pretrained(folder, device="cpu")([0, 9])
    assert [image.size for image in images] == [(64, 64)] * 2


def test_half_precision(model: Path):
    half = DetailFlowPipeline.from_pretrained(model, device="cpu", dtype=torch.bfloat16)
    assert half(["cat"])[0].size == (32, 32)
    assert len(half.reconstruct(gradient(32, 32))) == 5


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_type_as_text(dtype: str | torch.dtype, model: Path):
    for loader, weight in (
        (DetailFlowPipeline, lambda pipe: pipe.gpt.head.weight),
        (DetailFlowGPT, lambda gpt: gpt.head.weight),
        (DetailFlowTokenizer, lambda tokenizer: tokenizer.decoder.mask_token),
    ):
        assert weight(loader.from_pretrained(model, device="cpu", dtype=dtype)).dtype == torch.bfloat16
        assert weight(loader.from_pretrained(model, device="cpu", dtype=None)).dtype == torch.float32
        for wrong in ("int8", "float", torch.int64):
            with pytest.raises(
                DetailFlowError, match="dtype must be one of float32, bfloat16, float16, float64, not '"
            ):
                loader.from_pretrained(model, dtype=wrong)


def test_the_raw_weights_of_the_ar_model():
    """A published model has them beside the averaged ones; the tokenizer has one set."""
    tiny = Path(__file__).parent / "parity" / "tiny-32"
    heads = [
        DetailFlowPipeline.from_pretrained(tiny, device="cpu", variant=v).gpt.head.weight for v in ("ema", "model")
    ]
    assert torch.equal(heads[0], DetailFlowPipeline.from_pretrained(tiny, device="cpu").gpt.head.weight)
    assert torch.equal(heads[1], DetailFlowGPT.from_pretrained(tiny, device="cpu", variant="model").head.weight)
    assert not torch.equal(*heads)


def test_only_the_path_goes_without_its_name(model: Path):
    """`DetailFlowGPT.from_pretrained(path, "cuda")` took the device for the variant."""
    for loader in (DetailFlowPipeline, DetailFlowGPT, DetailFlowTokenizer):
        with pytest.raises(TypeError):
            loader.from_pretrained(model, "cpu")


def test_one_default_device(model: Path, monkeypatch: pytest.MonkeyPatch):
    """The GPU if there is one, wherever a model is loaded."""
    asked: list[object] = []

    def choose(device: object) -> torch.device:
        asked.append(device)
        return torch.device("cpu")

    for name in ("pipeline", "models.pretrained"):
        monkeypatch.setattr(f"detailflow.{name}.choose_device", choose)
    for loader in (DetailFlowGPT, DetailFlowTokenizer, DetailFlowPipeline):
        loader.from_pretrained(model)
    assert asked == [None, None, None, torch.device("cpu"), torch.device("cpu")]


def test_to(model: Path):
    pipe = DetailFlowPipeline.from_pretrained(model, device="cpu")
    pipe.gpt.compiled_for = 4
    assert pipe.to("cpu", "bfloat16") is pipe and pipe.gpt.compiled_for is None
    assert pipe.gpt.head.weight.dtype == pipe.tokenizer.decoder.mask_token.dtype == torch.bfloat16
    assert pipe.to(dtype=torch.float32).device == torch.device("cpu")
    assert pipe(["cat"])[0].size == (32, 32)
    with pytest.raises(DetailFlowError, match="device 'quantum' cannot be used here"):
        pipe.to("quantum")


def test_what_a_pipeline_says_of_itself(pipeline: DetailFlowPipeline, shipped: DetailFlowPipeline, model: Path):
    sizes = "32×32 pixels in 16 tokens, 5 classes, float32 on cpu>"
    assert repr(pipeline) == f"<DetailFlowPipeline: {sizes}"
    assert repr(DetailFlowPipeline.from_pretrained(model, device="cpu")) == f"<DetailFlowPipeline of {model}: {sizes}"
    assert repr(shipped).startswith("<DetailFlowPipeline of the shipped model: 32×32 pixels in 48 tokens, 10 classes, ")
    assert shipped.labels.names[3] == "cat"


def test_a_folder_without_a_model(tmp_path: Path):
    with pytest.raises(DetailFlowError, match=str(tmp_path)):
        DetailFlowPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("device", ["quantum", "cuda:99", "meta", "cpu:x", "hpu", "privateuseone"])
def test_devices_that_cannot_be_used(device: str, model: Path):
    with pytest.raises(DetailFlowError, match=f"device '{device}' cannot be used here"):
        DetailFlowPipeline.from_pretrained(model, device=device)


def test_the_device_is_the_gpu_where_there_is_one():
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device(torch.device("cpu")) == torch.device("cpu")


# ------------------------------------------------------------------------------------------------- reconstruction


@pytest.mark.parametrize("size", [(32, 32), (100, 60), (7, 300), (1, 1)])
def test_reconstruction(pipeline: DetailFlowPipeline, size: tuple[int, int]):
    image = gradient(*size)
    stages = pipeline.reconstruct(image)
    schedule = pipeline.tokenizer.schedule
    assert [stage.num_tokens for stage in stages] == [1, 2, 4, 8, 16]
    original = center_crop(image, 32)
    for stage in stages:
        assert stage.size == schedule.decode_size(stage.num_tokens)
        (shown,) = stage.images
        assert shown.size == (32, 32)
        error = np.mean((np.asarray(shown, float) - original) ** 2)
        assert stage.psnr == pytest.approx(10 * math.log10(255**2 / error))


def test_reconstruction_is_decoding_what_was_encoded(pipeline: DetailFlowPipeline):
    image = gradient(32, 32)
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    pixels = pipeline.tokenizer.decode(pipeline.tokenizer.encode(x))[0].permute(1, 2, 0)
    expected = (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8).numpy()
    (stage,) = pipeline.reconstruct(image, counts=[16])
    np.testing.assert_array_equal(np.asarray(stage.images[0]), expected)


def test_reconstruction_from_other_modes_and_counts(pipeline: DetailFlowPipeline):
    stages = pipeline.reconstruct(gradient(40, 40).convert("L"), counts=[3, 12])
    assert [stage.num_tokens for stage in stages] == [3, 12]
    for counts, message in (
        ([5], "each of counts must be 1 to 4 or a multiple of 4 up to 16, not 5"),
        ([True], "each of counts must be an integer, not True"),
        (8, r"counts must be a list of numbers of tokens, such as \[1, 16\], not 8"),
    ):
        with pytest.raises(DetailFlowError, match=message):
            pipeline.reconstruct(gradient(40, 40), counts=counts)  # type: ignore[arg-type]
        with pytest.raises(DetailFlowError, match=message):
            pipeline.stream("cat", counts=counts)  # type: ignore[arg-type]


def test_stages_that_never_come(pipeline: DetailFlowPipeline):
    for options, message in (
        ({"counts": [16], "num_tokens": 8}, "each of counts must be at most num_tokens, which is 8, not 16"),
        ({"counts": [1, 4], "prefix": [0] * 8}, "each of counts must be at least the 8 tokens of prefix, not 1"),
    ):
        with pytest.raises(DetailFlowError) as refused:
            pipeline.stream("cat", **options)
        assert str(refused.value) == message
    for batch_size in (1, 2):  # the prefix is the first stage
        stages = pipeline.stream("cat", prefix=[0] * 8, num_images_per_class=2, batch_size=batch_size)
        assert [stage.num_tokens for stage in stages] == [8, 12, 16]


def test_models_in_each_others_place(pipeline: DetailFlowPipeline):
    with pytest.raises(DetailFlowError) as refused:
        DetailFlowPipeline(pipeline.gpt, pipeline.tokenizer)  # type: ignore[arg-type]
    assert str(refused.value) == "tokenizer must be a DetailFlowTokenizer, not a DetailFlowGPT"


@pytest.mark.parametrize("size", [32, ("a", "b"), (32.0, 32.0), (32,), (32, 32, 32), "32"])
def test_sizes_of_variations_that_are_none(size: Any, pipeline: DetailFlowPipeline):
    with pytest.raises(DetailFlowError) as refused:
        pipeline.vary(gradient(40, 40), keep=8, size=size)
    assert str(refused.value) == f"size must be (height, width), both integers, not {size!r}"


def test_no_name_is_no_folder(pipeline: DetailFlowPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for model in (pipeline, pipeline.gpt):
        with pytest.raises(DetailFlowError, match="folder must be a path, not ''"):
            model.save_pretrained("")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- variations


def test_variations_keep_the_first_tokens_and_follow_the_class(pipeline: DetailFlowPipeline):
    photo = gradient(50, 40)
    ids = pipeline.tokens(photo)
    kept = next(stage for stage in pipeline.reconstruct(photo, counts=[8]))
    varied = pipeline.vary(photo, keep=8, label="cat", num_images=3, seed=1)
    assert [image.size for image in varied] == [(32, 32)] * 3 and len(set(as_bytes(varied))) == 3
    for same in (ids, ids[None]):  # the latter as `encode` returns it
        assert as_bytes(pipeline.vary(same, keep=8, label="cat", num_images=3, seed=1)) == as_bytes(varied)
    assert as_bytes(pipeline.vary(ids.tolist()[:8], keep=8, label="cat", num_images=3, seed=1)) == as_bytes(varied)
    assert as_bytes(pipeline.vary(photo, keep=8, label="bird", num_images=3, seed=1)) != as_bytes(varied)
    assert as_bytes(pipeline.vary(photo, keep=8, num_images=3, seed=1)) != as_bytes(varied)  # of no class
    first, *_, last = pipeline.stream("cat", prefix=ids[:8], num_images_per_class=3, seed=1)
    assert (first.num_tokens, first.size) == (8, kept.size)
    shown = [image.resize((32, 32), Image.Resampling.BICUBIC) for image in first.images]
    assert as_bytes(shown) == as_bytes(kept.images) * 3
    assert as_bytes(last.images) == as_bytes(varied)


def test_all_tokens_kept_are_the_reconstruction(pipeline: DetailFlowPipeline):
    photo = gradient(64, 64)
    *_, whole = pipeline.reconstruct(photo)
    assert as_bytes(pipeline.vary(photo, keep=16, label="cat", num_images=2)) == as_bytes(whole.images) * 2


def test_a_generated_image_is_a_variation_of_its_own(pipeline: DetailFlowPipeline):
    """The same seed draws the same tokens after those that are kept."""
    (image,) = pipeline("cat", seed=4)
    ids = pipeline.gpt.generate(torch.tensor([3]), generator=[image_generator(4, 0)])[0]
    for keep in pipeline.tokenizer.schedule.valid_counts:
        assert as_bytes(pipeline.vary(ids, keep=keep, label="cat", seed=4)) == as_bytes([image])


def test_variations_in_batches(pipeline: DetailFlowPipeline):
    ids = pipeline.tokens(gradient(32, 32))
    options = dict(keep=4, label="cat", num_images=5, temperature=0.9)
    assert as_bytes(pipeline.vary(ids, batch_size=2, **options)) == as_bytes(pipeline.vary(ids, **options))


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ([1] * 16, {"keep": 5}, "keep must be 1 to 4 or a multiple of 4 up to 16, not 5"),
        ([1] * 16, {"keep": 0}, "keep must be 1 to 4"),
        ([1] * 16, {"keep": "8"}, "keep must be an integer, not '8'"),
        ([1] * 16, {"keep": 8, "num_images_per_class": 4}, "num_images_per_class is for a plain call: give num_images"),
        ([1] * 16, {"keep": 8, "prefix": [1, 2, 3]}, "prefix is for a plain call: give the tokens in place of the"),
        ([1] * 8, {"keep": 12}, "keep must be at most the 8 tokens given, not 12"),
        ([64] * 16, {"keep": 8}, "tokens must be 0 to 63"),
        ([0.5] * 16, {"keep": 8}, "tokens must be integers"),
        ("cat.png", {"keep": 8}, "cat.png does not exist: give the path of an image file"),
        ({"a": 1}, {"keep": 8}, "tokens must be a list of integers"),
        ([1] * 16, {"keep": 8, "label": "dgo"}, "unknown class 'dgo'"),
        ([1] * 16, {"keep": 8, "num_images": 0}, "^num_images must be a positive integer, not 0"),
        ([1] * 16, {"keep": 8, "size": (7, 5)}, r"no image is encoded at a size of \(7, 5\)"),
        ([1] * 16, {"keep": 8, "size": (0, 0)}, "no image is encoded at a size of"),
        ([1] * 16, {"keep": 8, "num_tokens": 4}, "num_tokens must be at least keep, which is 8, not 4"),
    ],
)
def test_variations_that_cannot_be(
    image: object, options: dict[str, object], message: str, pipeline: DetailFlowPipeline
):
    with pytest.raises(DetailFlowError, match=message):
        pipeline.vary(image, **options)  # type: ignore[arg-type]


def test_an_image_by_its_path(pipeline: DetailFlowPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    image = gradient(50, 40)
    image.save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png"), "~/a.png"):
        assert pipeline.tokens(path).equal(pipeline.tokens(image))
        assert as_bytes(pipeline.vary(path, keep=8)) == as_bytes(pipeline.vary(image, keep=8))
        assert pipeline.reconstruct(path, whole=True) == pipeline.reconstruct(image, whole=True)
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DetailFlowError, match="a.png is not an image"):
        pipeline.reconstruct(tmp_path / "a.png")


def test_what_is_no_image(pipeline: DetailFlowPipeline):
    for given in (np.zeros((32, 32, 3), np.uint8), None, b"bytes"):
        with pytest.raises(DetailFlowError, match="give a PIL image, such as Image.open.*, or the path of one, not a"):
            pipeline.reconstruct(given)  # type: ignore[arg-type]
    for given in ("photo.jpg", gradient(32, 32), np.zeros((1, 3, 32, 32), np.float32)):
        with pytest.raises(
            DetailFlowError, match=r"^images must be a tensor \(pipe.tokens takes images and paths\), not .{1,41}$"
        ):
            pipeline.tokenizer.encode(given)  # type: ignore[arg-type]
        with pytest.raises(DetailFlowError, match="images must be a tensor "):
            wrong = torch.zeros(1, 1, dtype=torch.long)
            pipeline.tokenizer.encode_correction(given, position=0, wrong_tokens=wrong)  # type: ignore[arg-type]


def test_what_a_variation_keeps_is_a_number(pipeline: DetailFlowPipeline):
    with pytest.raises(DetailFlowError, match="keep must be a number of tokens, not None"):
        pipeline.vary([1] * 16, keep=None)  # type: ignore[arg-type]
    with pytest.raises(DetailFlowError, match="num_tokens must be at least keep, which is 8, not 4"):
        pipeline.vary([1] * 16, keep=8, num_tokens=4)


def test_a_prefix_is_checked_at_once(pipeline: DetailFlowPipeline):
    with pytest.raises(DetailFlowError, match="the length of prefix must be 1 to 4"):
        pipeline.stream("cat", prefix=[1] * 5)  # not at the first stage
    with pytest.raises(DetailFlowError, match="prefix must be a list of integers"):
        pipeline("cat", prefix="cat.png")  # `vary` takes images
    with pytest.raises(DetailFlowError, match="the length of prefix must be 1 to 4 .* not 0"):
        pipeline("cat", prefix=[])
