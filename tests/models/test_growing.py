"""A model grown to more tokens says of its first tokens exactly what the smaller one says."""

from dataclasses import replace

import pytest
import torch

from detailflow import DetailFlowGPT, DetailFlowPipeline, DetailFlowTokenizer
from detailflow.data.images import open_images
from detailflow.data.transforms import center_crop, to_tensor
from detailflow.errors import DetailFlowError
from detailflow.models.gpt import GPTConfig
from detailflow.models.growing import PER_TOKEN, grow_tokenizer, require_growable
from detailflow.models.layers import ViTConfig
from detailflow.models.loading import load_weights


@pytest.fixture(scope="module")
def small() -> DetailFlowTokenizer:
    """The shipped tokenizer: real weights, 48 tokens at side 32."""
    return DetailFlowPipeline.from_pretrained().tokenizer


def grown(small: DetailFlowTokenizer, **sizes: int) -> tuple[DetailFlowTokenizer, DetailFlowTokenizer]:
    """The tokenizer of other sizes from those weights, and as it was before."""
    torch.manual_seed(1)
    before = DetailFlowTokenizer(replace(small.config, **sizes)).eval()
    after = DetailFlowTokenizer(before.config).eval()
    load_weights(after, grow_tokenizer(small.state_dict(), small.config, before, "small"), "small")
    return after, before


@pytest.mark.parametrize(("num_tokens", "image_size"), [(48, 64), (56, 32), (96, 64)])
def test_first_tokens_are_those_of_the_smaller_tokenizer(
    num_tokens: int, image_size: int, small: DetailFlowTokenizer, cifar: object
):
    source = open_images(str(cifar))
    images = torch.stack([to_tensor(center_crop(source.image(i), 32)) for i in range(4)])
    large, _ = grown(small, num_tokens=num_tokens, image_size=image_size)
    ids = large.encode(images)
    expected = small.encode(images)
    assert ids.shape == (4, num_tokens) and torch.equal(ids[:, :48], expected)
    wrong = torch.arange(8).expand(4, 8)
    assert torch.equal(
        large.encode_correction(images, position=16, wrong_tokens=wrong)[:, :48],
        small.encode_correction(images, position=16, wrong_tokens=wrong),
    )
    for n in (1, 16, 48):
        torch.testing.assert_close(large.decode(expected[:, :n], size=32), small.decode(expected[:, :n], size=32))


def test_further_tokens_start_afresh(small: DetailFlowTokenizer):
    large, fresh = grown(small, num_tokens=64)
    old, made, own = small.state_dict(), large.state_dict(), fresh.state_dict()
    for name, tensor in made.items():
        if name in PER_TOKEN:
            assert torch.equal(tensor[:48], old[name]) and torch.equal(tensor[48:], own[name][48:])
            assert 0.3 < float(tensor[48:].std()) < 0.7  # of the scale of what is added to it
        else:
            assert torch.equal(tensor, old[name])
    assert len(set(PER_TOKEN) & made.keys()) == len(PER_TOKEN)


def test_a_decoder_grows(small: DetailFlowTokenizer):
    """In depth, and to convolutions at its end; it draws the same pictures, and all that is new can learn."""
    config = replace(small.config, decoder=ViTConfig(64, 5, 4), pixel_channels=3)
    small = DetailFlowTokenizer(config).eval()
    config = replace(config, decoder=ViTConfig(64, 7, 4), pixel_channels=12)
    torch.manual_seed(1)
    fresh = DetailFlowTokenizer(config)
    tensors = grow_tokenizer(small.state_dict(), small.config, fresh, "small")
    large = DetailFlowTokenizer(config)
    load_weights(large, tensors, "small")
    ids = torch.randint(2048, (3, 48), generator=torch.Generator().manual_seed(0))
    for n in (1, 16, 48):
        torch.testing.assert_close(large.decode(ids[:, :n]), small.decode(ids[:, :n]))
    assert large.fingerprint() == small.fingerprint()
    adam = torch.optim.Adam(large.decoder.parameters(), lr=1e-3)
    before = {name: x.clone() for name, x in large.decoder.named_parameters()}
    for _ in range(3):  # the last layers of what is new learn first, and then what feeds them
        large.decoder(large.quantizer.lookup(ids), 32, 32).square().mean().backward()
        adam.step()
        adam.zero_grad()
    new = {name for name in before if name.startswith(("blocks.5.", "blocks.6.", "refine_pixels."))}
    assert len(new) == 28 and not any(torch.equal(x, before[name]) for name, x in large.decoder.named_parameters())
    assert grow_tokenizer(tensors, config, fresh, "large").keys() == tensors.keys()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_tokens": 40}, "num_tokens is 48 there and 40 here, and a tokenizer can only grow"),
        ({"patch_size": 8}, "patch_size is 4 there and 8 here"),
        ({"codebook_size": 4096}, "codebook_size is 2048 there and 4096 here"),
        ({"codebook_dim": 16}, "codebook_dim is 8 there and 16 here"),
        ({"encoder": ViTConfig(128, 5, 4)}, "encoder is ViTConfig(width=128, depth=4, "),
        ({"decoder": ViTConfig(192, 5, 4)}, "decoder is ViTConfig(width=128, depth=8, "),
        ({"pixel_channels": 3}, "pixel_channels is 16 there and 3 here"),
        ({"decoder": ViTConfig(128, 4, 4)}, "decoder is ViTConfig(width=128, depth=8, "),
        ({"linear_path": True}, "linear_path is False there and True here"),
    ],
)
def test_what_can_not_grow(sizes: dict, message: str, small: DetailFlowTokenizer):
    with pytest.raises(DetailFlowError) as error:
        grown(small, **sizes)
    assert str(error.value).startswith(f"the weights of small do not fit: {message}")


def test_an_ar_model_grows():
    """With more tokens the logits of the first positions stay.

    A position's input, rotation and mask do not depend on N.
    """
    torch.manual_seed(0)
    sizes = GPTConfig(num_classes=3, width=32, depth=2, heads=2, mlp=64, num_tokens=16, group_size=4, codebook_size=64)
    small, large = DetailFlowGPT(sizes).eval(), DetailFlowGPT(replace(sizes, num_tokens=24)).eval()
    require_growable(large.config, small.config, "small")
    load_weights(large, small.state_dict(), "small")
    classes, ids = torch.tensor([0, 2]), torch.randint(64, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(large(classes, ids)[:, :16], small(classes, ids[:, :16]))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_tokens": 8}, "num_tokens is 16 there and 8 here, and an AR model can only grow"),
        ({"group_size": 8, "causal_tokens": 8}, "group_size is 4 there and 8 here"),
        ({"causal_tokens": 8}, "causal_tokens is 4 there and 8 here"),
        ({"width": 64}, "width is 32 there and 64 here"),
    ],
)
def test_what_an_ar_model_can_not_grow_to(sizes: dict, message: str):
    theirs = GPTConfig(num_classes=3, width=32, depth=2, heads=2, mlp=64, num_tokens=16, group_size=4, codebook_size=64)
    with pytest.raises(DetailFlowError, match=f"^the weights of small do not fit: {message}"):
        require_growable(replace(theirs, **sizes), theirs, "small")
