"""SigLIP2's vision tower against transformers', its files, and the encoder that starts from it."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from detailflow import tensors
from detailflow.errors import DetailFlowError
from detailflow.models.layers import ViTConfig
from detailflow.models.siglip2 import SIGLIP2, SigLIP2, initialise_encoder
from detailflow.models.tokenizer import Encoder, TokenizerConfig

WIDTH, MLP, DEPTH, PATCH = 128, 200, 3, 4
FC1 = "vision_model.encoder.layers.1.mlp.fc1.weight"


def reference(width: int = WIDTH, heads: int = 2, depth: int = DEPTH):
    """transformers' whole SigLIP2, with its text tower and its pooling head, of random weights."""
    from transformers import Siglip2Config, Siglip2Model

    vision = dict(
        hidden_size=width, intermediate_size=MLP, num_hidden_layers=depth, num_attention_heads=heads, patch_size=PATCH
    )
    text = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=1000)
    model = Siglip2Model(Siglip2Config(vision_config=vision, text_config=text))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, biases are zero and scales one
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def hidden_state(model, images: Tensor) -> Tensor:
    """transformers' last hidden state.

    It takes patches, a mask of those that are not padding, and the grids' rows and columns.
    """
    batch, _, height, width = images.shape
    rows, columns = height // PATCH, width // PATCH
    patches = (
        images.view(batch, 3, rows, PATCH, columns, PATCH).permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
    )
    with torch.no_grad():
        grid = torch.tensor([rows, columns]).expand(batch, 2)
        return model.vision_model(patches, torch.ones(patches.shape[:2]), grid).last_hidden_state


def pixels(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def model():
    return reference()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siglip2")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the same model with other tensors (`None`: without) and returns the file."""

    def write(**tensors: Tensor | None) -> Path:
        stored = {**load_file(folder / "model.safetensors"), **tensors}
        path = tmp_path / "changed.safetensors"
        save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, path)
        return path

    return write


def encoder(width: int = WIDTH, depth: int = 2, heads: int = 2, mlp: int = MLP, patch: int = PATCH) -> Encoder:
    torch.manual_seed(2)
    vit = ViTConfig(width, depth, heads, mlp)
    return Encoder(TokenizerConfig(vit, vit, image_size=32, patch_size=patch, num_tokens=16, codebook_size=64))


def error_of(path_or_id: str | Path, depth: int | None = None) -> str:
    with pytest.raises(DetailFlowError) as caught:
        SigLIP2.from_pretrained(path_or_id, depth)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (24, 40), (96, 16), (4, 4)], ids=str)
def test_agrees_with_transformers(model, folder: Path, size: tuple[int, int]):
    images = pixels(2, 3, *size)
    ours = SigLIP2.from_pretrained(folder)(images)
    expected = hidden_state(model, images)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1152, 16)])
def test_heads_follow_from_the_width(width: int, heads: int, tmp_path: Path):
    model = reference(width, heads, depth=1)
    model.save_pretrained(tmp_path)
    images = pixels(1, 3, 16, 16)
    torch.testing.assert_close(
        SigLIP2.from_pretrained(tmp_path)(images), hidden_state(model, images), atol=1e-4, rtol=0
    )


def test_the_first_layers(model, folder: Path):
    tower = SigLIP2.from_pretrained(folder, depth=2)
    assert len(tower.blocks) == 2
    images = pixels(2, 3, 24, 32)
    last = model.vision_model.encoder.layers.pop(2)
    try:
        torch.testing.assert_close(tower(images), hidden_state(model, images), atol=1e-4, rtol=0)
    finally:
        model.vision_model.encoder.layers.append(last)


def test_alignment_target(model, folder: Path):
    images = pixels(2, 3, 32, 24)
    tower = SigLIP2.from_pretrained(folder)
    target = tower.alignment_target(images)
    assert target.shape == (2, WIDTH) and not target.requires_grad
    torch.testing.assert_close(target, hidden_state(model, images).mean(1), atol=1e-4, rtol=0)
    half = SigLIP2.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.alignment_target(images).dtype == torch.float32
    assert torch.cosine_similarity(half.alignment_target(images), target).min() > 0.999


def test_frozen(folder: Path):
    tower = SigLIP2.from_pretrained(folder)
    assert not tower.training and not any(parameter.requires_grad for parameter in tower.parameters())
    assert not tower(pixels(1, 3, 8, 8)).requires_grad


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 8, 10), (1, 3, 0, 8)], ids=str)
def test_wrong_images(folder: Path, shape: tuple[int, ...]):
    tower = SigLIP2.from_pretrained(folder, depth=1)
    with pytest.raises(DetailFlowError, match="images must be floats of shape .*, H and W multiples of 4, not"):
        tower(torch.zeros(shape))
    with pytest.raises(DetailFlowError, match="not .* torch.uint8"):
        tower.alignment_target(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


# ------------------------------------------------------------------------------------------------- files


def same(tower: SigLIP2, folder: Path) -> bool:
    expected = SigLIP2.from_pretrained(folder, len(tower.blocks)).state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in tower.state_dict().items())


def test_a_file_of_any_name(folder: Path, tmp_path: Path):
    (tmp_path / "teacher.safetensors").symlink_to(folder / "model.safetensors")
    assert same(SigLIP2.from_pretrained(tmp_path / "teacher.safetensors"), folder)


def test_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert same(SigLIP2.from_pretrained(f"~/{folder.name}"), folder)


def test_shards(model, folder: Path, tmp_path: Path):
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert same(SigLIP2.from_pretrained(tmp_path), folder) and same(SigLIP2.from_pretrained(tmp_path, 1), folder)
    shards[1].unlink()
    assert f"has no {shards[1].name}" in error_of(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    assert "which is not a .safetensors file beside it" in error_of(tmp_path)


def test_nothing_else_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []

    class Spy:
        def __init__(self, file: object) -> None:
            self.get_slice, self.keys = file.get_slice, file.keys
            self.get_tensor = lambda name: read.append(name) or file.get_tensor(name)

    opened = tensors.safe_open

    @contextmanager
    def spying(*arguments: object) -> Iterator[Spy]:
        with opened(*arguments) as file:
            yield Spy(file)

    monkeypatch.setattr(tensors, "safe_open", spying)
    SigLIP2.from_pretrained(folder, depth=1)
    assert len(read) == len(set(read)) == 5 + 16
    assert all(name.startswith(("vision_model.e", "vision_model.post_layernorm")) for name in read)
    assert not any("layers.1." in name for name in read)


def test_hub_name(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        asked.append(repository)
        assert set(allow_patterns) == {"model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"}
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    monkeypatch.chdir(tmp_path)
    assert same(SigLIP2.from_pretrained(), folder) and same(SigLIP2.from_pretrained("someone/else"), folder)
    initialise_encoder(encoder())
    assert asked == [SIGLIP2, "someone/else", SIGLIP2] and SIGLIP2 == "google/siglip2-so400m-patch16-naflex"


def test_a_failed_download(monkeypatch: pytest.MonkeyPatch):
    def snapshot_download(*arguments: object, **options: object) -> str:
        raise OSError("no route\nto host.")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert f"could not download {SIGLIP2!r} from the Hugging Face hub (no route)" in error_of(SIGLIP2)


@pytest.mark.parametrize(
    "path", ["./nowhere", "/no/where", "a/b/c", "siglip2", "", "/" + "x" * 300, Path("owner/name")], ids=str
)
def test_no_such_folder(path: str | Path):
    assert error_of(path) == f"there is no such folder or file: {str(path)!r}"


def test_empty_folder(tmp_path: Path):
    assert "has no model.safetensors" in error_of(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_truncated_file(folder: Path, tmp_path: Path, size: int):
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:size])
    assert "model.safetensors: it is damaged or incomplete" in error_of(tmp_path)


@pytest.mark.parametrize("depth", [0, -1, DEPTH + 1, 1.5])
def test_wrong_depth(folder: Path, depth: int):
    assert error_of(folder, depth) == f"depth must be 1 to {DEPTH}, the number of layers in {folder}, not {depth}"


def test_missing_tensors(changed: Callable[..., Path]):
    names = [f"vision_model.encoder.layers.1.self_attn.{x}_proj.{part}" for x in "qv" for part in ("weight", "bias")]
    path = changed(**dict.fromkeys(names))
    assert error_of(path).endswith(f"it lacks {', '.join(sorted(names)[:3])} and 1 more")
    assert len(SigLIP2.from_pretrained(path, 1).blocks) == 1  # as that layer is not looked at


def test_a_file_of_something_else(tmp_path: Path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "holds no SigLIP2 vision tower: it has no tensors under vision_model.encoder.layers" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            FC1,
            torch.zeros(MLP, WIDTH + 1),
            f"{FC1} in .* must be floats of shape (200, 128), not F32 of shape (200, 129)",
        ),
        (FC1, torch.zeros(MLP), "not F32 of shape (200,)"),
        (FC1, torch.zeros(MLP, WIDTH, dtype=torch.int8), "not I8 of shape (200, 128)"),
        ("vision_model.embeddings.position_embedding.weight", torch.zeros(196, WIDTH), "of shape (256, 128), not F32"),
        (
            "vision_model.encoder.layers.2.self_attn.k_proj.weight",
            torch.zeros(64, WIDTH),
            "(128, 128), not F32 of shape (64, 128)",
        ),
        ("vision_model.embeddings.patch_embedding.weight", torch.zeros(WIDTH, 50), "of shape (128, 48), not F32"),
        (
            "vision_model.embeddings.patch_embedding.weight",
            torch.zeros(WIDTH, 3, 4, 4),
            "must be a matrix, as in a NaFlex SigLIP2",
        ),
        (
            "vision_model.encoder.layers.0.mlp.fc1.weight",
            torch.zeros(MLP, 200),
            "heads must divide width, and 3 does not divide 200",
        ),
    ],
    ids=range(8),
)
def test_wrong_tensors(changed: Callable[..., Path], name: str, tensor: Tensor, message: str):
    path = changed(**{name: tensor})
    error = error_of(path)
    assert str(path) in error and all(part in error for part in message.split(".*"))


# ------------------------------------------------------------------------------------------------- the encoder


@pytest.mark.parametrize("depth", [1, 2, DEPTH])
def test_an_encoder_starts_from_the_first_layers(folder: Path, depth: int):
    """Every block's keys and values of the patches, so all that queries see of them, are the teacher's."""
    start, fresh = encoder(depth=depth), encoder(depth=depth)
    parameters = dict(start.named_parameters())
    initialise_encoder(start, folder)
    assert all(
        start.get_parameter(name) is parameter and parameter.requires_grad for name, parameter in parameters.items()
    )
    tower = SigLIP2.from_pretrained(folder, depth)
    images, seen = pixels(2, 3, 24, 32), []
    for block in tower.blocks:
        block.attn.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    with torch.no_grad():
        tower(images)
        for (k, v), (other_k, other_v) in zip(start.patches(images).blocks, seen, strict=True):
            assert torch.equal(k, other_k) and torch.equal(v, other_v)
    copied = {name for name, parameter in parameters.items() if not torch.equal(parameter, fresh.get_parameter(name))}
    assert copied == tower.state_dict().keys()  # the queries and `refine` are left alone
    assert torch.equal(start.norm.weight, tower.norm.weight)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 64, "heads": 1}, "it has width 64, heads 1, and that has width 128, heads 2"),
        ({"heads": 4}, "it has heads 4, and that has heads 2"),
        ({"mlp": 100}, "it has MLP size 100, and that has MLP size 200"),
        ({"patch": 8}, "it has patch size 8, and that has patch size 4"),
    ],
)
def test_an_encoder_of_other_sizes(folder: Path, sizes: dict[str, int], message: str):
    start = encoder(**sizes)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    with pytest.raises(DetailFlowError) as caught:
        initialise_encoder(start, folder)
    assert str(caught.value) == f"the encoder cannot start from {folder}: {message}"
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())


def test_an_encoder_with_more_layers(folder: Path):
    with pytest.raises(
        DetailFlowError, match=f"depth must be 1 to {DEPTH}, the number of layers in .*, not {DEPTH + 1}"
    ):
        initialise_encoder(encoder(depth=DEPTH + 1), folder)


def test_a_tower_saved_alone(model, folder: Path, tmp_path: Path):
    """transformers writes its tensors without the prefix `vision_model.`."""
    save_file(model.vision_model.state_dict(), tmp_path / "model.safetensors")
    images = pixels(1, 3, 16, 24)
    assert torch.equal(SigLIP2.from_pretrained(tmp_path)(images), SigLIP2.from_pretrained(folder)(images))
