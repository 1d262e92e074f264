"""How good a model of CIFAR-10 is, by the small feature network in shared/eval: the figures of docs/shipped-model.md.

    python benchmarks/cifar10_quality.py tokenizer --model RUN/tokenizer
    python benchmarks/cifar10_quality.py samples --model RUN [--guidance 1.5 2 2.5] [--temperature 1] [--top-k 0] [--top-p 1]

Fréchet distances are against all 50,000 training images, as that folder's README says.
"""

import argparse
import json
import runpy
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from detailflow import DetailFlowGPT, DetailFlowTokenizer
from detailflow.data.images import open_images
from detailflow.data.transforms import to_tensor, to_uint8

SHARED = Path(__file__).resolve().parents[2] / "shared"
GAUSSIAN = tuple[np.ndarray, np.ndarray]


def load_images(split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """(n, 32, 32, 3) uint8 and (n,) labels."""
    source = open_images(str(SHARED / f"data/cifar10/{split}.parquet"))
    count = len(source) if count is None else count
    images = np.stack([np.asarray(source.image(i)) for i in range(count)])
    return torch.from_numpy(images), torch.from_numpy(np.asarray(source.labels[:count]))


def gaussian(features: Tensor) -> GAUSSIAN:
    """Mean and covariance, float64."""
    x = features.double().numpy()
    return x.mean(0), np.cov(x, rowvar=False)


def frechet(a: GAUSSIAN, b: GAUSSIAN) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), the root's trace through eigenvalues."""
    values = np.linalg.eigvals(a[1] @ b[1])
    return float(((a[0] - b[0]) ** 2).sum() + np.trace(a[1]) + np.trace(b[1]) - 2 * np.sqrt(np.clip(values.real, 0, None)).sum())


@torch.inference_mode()
def features_of(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, 256) and recognised classes (n,) of uint8 images."""
    outs = [
        network(to_tensor(batch).contiguous(memory_format=torch.channels_last))
        for batch in tqdm(images.split(250), desc="features", leave=False)
    ]
    return torch.cat([f for f, _ in outs]), torch.cat([logits.argmax(-1) for _, logits in outs])


def training_statistics(network: nn.Module, cache: Path) -> GAUSSIAN:
    """Of the 50,000 training images, kept in `cache`."""
    if not cache.exists():
        mean, covariance = gaussian(features_of(network, load_images("train")[0])[0])
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, mean=mean, covariance=covariance)
    with np.load(cache) as stored:
        return stored["mean"], stored["covariance"]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """(n,) dB of uint8 images, each by itself."""
    return 10 * torch.log10(255**2 / (a.float() - b.float()).square().flatten(1).mean(1).clamp(min=1e-3))


@torch.inference_mode()
def evaluate_tokenizer(tokenizer: DetailFlowTokenizer, network: nn.Module, reference: GAUSSIAN, count: int) -> dict[str, object]:
    """PSNR by n, Fréchet distance and accuracy at all tokens, codebook usage, and what self-correction brings."""
    images, labels = load_images("test", count)
    ids = torch.cat([tokenizer.encode(to_tensor(batch)) for batch in tqdm(images.split(250), desc="encode", leave=False)])
    result: dict[str, object] = {"psnr_mean_colour": mean_colour_psnr(images), "psnr": {}}
    for n in tokenizer.schedule.valid_counts:
        rebuilt = decode(tokenizer, ids[:, :n], 32)
        result["psnr"][n] = round(psnr(rebuilt, images).mean().item(), 3)  # type: ignore[index]
    features, classes = features_of(network, rebuilt)
    result["frechet"] = frechet(gaussian(features), reference)
    result["accuracy"] = (classes == labels).double().mean().item()
    counts = torch.bincount(ids.flatten(), minlength=tokenizer.config.codebook_size).double()
    p = counts[counts > 0] / counts.sum()
    result["codebook_usage"] = (counts > 0).double().mean().item()
    result["codebook_perplexity"] = (-(p * p.log()).sum()).exp().item()
    result["correction"] = correction(tokenizer, images[:1000], ids[:1000])
    return result


def mean_colour_psnr(images: Tensor) -> float:
    """Of each image's mean colour."""
    mean = images.float().mean((1, 2), keepdim=True).round()
    return psnr(mean.expand(images.shape), images).mean().item()


def correction(tokenizer: DetailFlowTokenizer, images: Tensor, clean: Tensor) -> dict[str, float]:
    """PSNR with mistakes planted in the second group and the first parallel one, later tokens clean or corrected."""
    schedule, result = tokenizer.schedule, {}
    second = schedule.group_size
    for name, start in (("second group", second), ("first parallel group", schedule.prefix)):
        generator = torch.Generator().manual_seed(0)
        end = start + schedule.group_size
        planted, corrected = clean.clone(), clean.clone()
        for batch in torch.arange(len(images)).split(250):
            patches = tokenizer.encode_patches(to_tensor(images[batch]))
            z = tokenizer.encode_latents(patches, end)[:, start:end]
            planted[batch, start:end] = corrected[batch, start:end] = tokenizer.plant_mistakes(z, generator=generator)
            after = tokenizer.quantizer.nearest(tokenizer.correct_latents(patches, planted[batch], end))[:, end:]
            corrected[batch, end:] = after
        for row, ids in (("clean", clean), ("planted", planted), ("corrected", corrected)):
            result[f"{name}, {row}"] = round(psnr(decode(tokenizer, ids, 32), images).mean().item(), 3)
    return result


def decode(tokenizer: DetailFlowTokenizer, ids: Tensor, size: int) -> Tensor:
    """Codes → uint8 images of `size`, decoded at D(n) and enlarged."""
    out = []
    for batch in ids.split(500):
        pixels = tokenizer.decode(batch)
        if pixels.shape[-1] != size:
            pixels = nn.functional.interpolate(pixels, (size, size), mode="bicubic", align_corners=False)
        out.append(to_uint8(pixels))
    return torch.cat(out)


@torch.inference_mode()
def evaluate_samples(
    tokenizer: DetailFlowTokenizer,
    gpt: DetailFlowGPT,
    network: nn.Module,
    reference: GAUSSIAN,
    count: int,
    seed: int,
    **sampling,
) -> dict[str, float]:
    """Fréchet distance and class accuracy of `count` samples, classes balanced."""
    labels = torch.arange(count) % gpt.config.num_classes
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    pixels = torch.cat(
        [
            decode(tokenizer, gpt.generate(batch, generator=generator, **sampling), 32)
            for batch in tqdm(labels.split(500), desc="generate", leave=False)
        ]
    )
    seconds = time.perf_counter() - start
    features, classes = features_of(network, pixels)
    return {
        "frechet": round(frechet(gaussian(features), reference), 3),
        "accuracy": round((classes == labels).double().mean().item(), 4),
        "images_per_second": round(count / seconds, 1),
    }


def main() -> None:
    """Print one JSON line per setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tokenizer", "samples"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--count", type=int, help="test images (default 10,000) or samples (default 5,000)")
    parser.add_argument("--guidance", type=float, nargs="*", default=[None])
    parser.add_argument("--schedule", nargs="*", default=[None])
    parser.add_argument("--temperature", type=float, nargs="*", default=[None])
    parser.add_argument("--top-k", type=int, nargs="*", default=[None])
    parser.add_argument("--top-p", type=float, nargs="*", default=[None])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("outputs/cifar10-train-features.npz"))
    options = parser.parse_args()
    network = runpy.run_path(str(SHARED / "eval/cifar10_features.py"))["load"]()
    reference = training_statistics(network, options.cache)
    tokenizer = DetailFlowTokenizer.from_pretrained(options.model)
    if options.what == "tokenizer":
        print(json.dumps(evaluate_tokenizer(tokenizer, network, reference, options.count or 10_000), indent=1))
        return
    gpt = DetailFlowGPT.from_pretrained(options.model)
    for s in options.guidance:
        for schedule in options.schedule:
            for t in options.temperature:
                for k in options.top_k:
                    for p in options.top_p:
                        sampling = {
                            "guidance_scale": s,
                            "guidance_schedule": schedule,
                            "temperature": t,
                            "top_k": k,
                            "top_p": p,
                        }
                        result = evaluate_samples(
                            tokenizer, gpt, network, reference, options.count or 5_000, options.seed, **sampling
                        )
                        print(json.dumps({**{a: b for a, b in sampling.items() if b is not None}, **result}), flush=True)


if __name__ == "__main__":
    main()
