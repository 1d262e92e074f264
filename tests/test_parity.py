"""The published implementation's recorded outputs, through the public contract, from the published layout
as it lies there."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detailflow import DetailFlowGPT, DetailFlowTokenizer
from detailflow.schedule import TokenSchedule

TINY = Path(__file__).parent / "parity" / "tiny-32"
RECORDED = load_file(TINY / "recorded.safetensors")
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module")
def tokenizer() -> DetailFlowTokenizer:
    return DetailFlowTokenizer.from_pretrained(TINY / "tokenizer", device="cpu")


@pytest.fixture(scope="module")
def gpt() -> DetailFlowGPT:
    return DetailFlowGPT.from_pretrained(TINY / "gpt", device="cpu")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return RECORDED["images_uint8"].permute(0, 3, 1, 2) / 127.5 - 1


def numbers(pattern: str) -> list[tuple[int, ...]]:
    found = {tuple(map(int, m.groups())) for key in RECORDED if (m := re.fullmatch(pattern, key))}
    assert found, f"no recording matches {pattern}"
    return sorted(found)


def test_resolution_map(tokenizer: DetailFlowTokenizer) -> None:
    recorded = json.loads((TINY / "resolution.json").read_text())
    schedule = tokenizer.schedule
    assert [str(n) for n in schedule.valid_counts] == list(recorded["token2res"])
    for n, resolution in recorded["token2res"].items():
        assert schedule.resolution(int(n)) == resolution
    for n, side in recorded["token2decode_res"].items():
        assert schedule.decode_size(int(n)) == side
    for side, n in recorded["best_tokens_for_res"].items():
        assert schedule.best_count(int(side)) == n


def test_resolution_map_of_the_method_page() -> None:
    schedule = TokenSchedule(128, 8, 8, 256, 16)
    ns = [1, 6, 7, 8, 16, 24, 32, 48, 64, 80, 96, 128]
    assert [schedule.resolution(n) for n in ns] == [1, 15, 18, 21, 44, 67, 88, 128, 164, 196, 223, 256]
    assert [schedule.decode_size(n) for n in ns] == [16, 16, 32, 32, 48, 80, 96, 128, 176, 208, 224, 256]
    best = {16: 6, 32: 8, 48: 16, 80: 24, 96: 32, 128: 48, 176: 64, 224: 96, 256: 128}
    assert {side: schedule.best_count(side) for side in best} == best
    assert len(schedule.steps) == 23


@pytest.mark.parametrize("n", [n for (n,) in numbers(r"encode\.n(\d+)\.indices")])
def test_encode(tokenizer: DetailFlowTokenizer, images: torch.Tensor, n: int) -> None:
    with torch.no_grad():
        patches = tokenizer.encode_patches(images)
        queries = tokenizer.encoder.query_tokens[:n].expand(len(images), -1, -1)
        latents = tokenizer.encoder.queries(queries, patches, tokenizer.schedule)
        prequant = tokenizer.quantizer.project(latents)
    torch.testing.assert_close(latents, RECORDED[f"encode.n{n}.latents"], **TOLERANCE)
    torch.testing.assert_close(prequant, RECORDED[f"encode.n{n}.prequant"], **TOLERANCE)
    ids = tokenizer.encode(images, num_tokens=n)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, RECORDED[f"encode.n{n}.indices"].long())
    torch.testing.assert_close(tokenizer.quantizer.lookup(ids), RECORDED[f"encode.n{n}.quantized"], **TOLERANCE)


@pytest.mark.parametrize(("t", "s"), numbers(r"decode\.t(\d+)\.s(\d+)\.pixels"))
def test_decode(tokenizer: DetailFlowTokenizer, t: int, s: int) -> None:
    ids = RECORDED["encode.n32.indices"].long()[:, :t]
    torch.testing.assert_close(tokenizer.decode(ids, size=s), RECORDED[f"decode.t{t}.s{s}.pixels"], **TOLERANCE)


@pytest.mark.parametrize("p", [p for (p,) in numbers(r"correct\.p(\d+)\.clean")])
def test_correction(tokenizer: DetailFlowTokenizer, images: torch.Tensor, p: int) -> None:
    clean, given, label = (RECORDED[f"correct.p{p}.{row}"].long() for row in ("clean", "input", "label"))
    end = tokenizer.schedule.check_span(p)
    assert torch.equal(tokenizer.encode(images), clean)
    corrected = tokenizer.encode_correction(images, position=p, wrong_tokens=given[:, p:end])
    assert torch.equal(corrected, given)
    assert torch.equal(torch.cat((corrected[:, :p], clean[:, p:end], corrected[:, end:]), 1), label)
    torch.testing.assert_close(tokenizer.quantizer.lookup(corrected), RECORDED[f"correct.p{p}.quantized"], **TOLERANCE)


def test_gpt_logits_and_loss(gpt: DetailFlowGPT) -> None:
    class_ids, tokens = RECORDED["gpt.class_ids"].long(), RECORDED["gpt.tokens"].long()
    with torch.no_grad():
        logits = gpt(class_ids, tokens)
        null = gpt(torch.full_like(class_ids, gpt.config.num_classes), tokens)
    torch.testing.assert_close(logits, RECORDED["gpt.logits"], **TOLERANCE)
    torch.testing.assert_close(null, RECORDED["gpt.logits_null"], **TOLERANCE)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(loss[None], RECORDED["gpt.loss"], **TOLERANCE)


@pytest.mark.parametrize("key", sorted(k for k in RECORDED if k.startswith("gpt.greedy.")))
def test_greedy_generation(gpt: DetailFlowGPT, key: str) -> None:
    match = re.fullmatch(r"gpt\.greedy\.cfg([\d.]+?)(\.gradual)?", key)
    assert match
    ids = gpt.generate(
        RECORDED["gpt.class_ids"].long(),
        guidance_scale=float(match[1]),
        guidance_schedule="linear" if match[2] else "constant",
        temperature=0.0,
    )
    assert torch.equal(ids, RECORDED[key].long())


def test_model_weights_are_not_the_ema(gpt: DetailFlowGPT) -> None:
    raw = DetailFlowGPT.from_pretrained(TINY / "gpt", variant="model", device="cpu")
    torch.testing.assert_close(raw.head.weight * 2, gpt.head.weight)
