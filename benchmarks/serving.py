"""Throughput and latency of `detailflow serve` on this machine, with batches and without, in alternation.

    python benchmarks/serving.py [--model DIR] [--clients 1 4 16 64] [--seconds 10] [--rounds 3]

Each client asks for one image after the other. Also: the time to the first partial image beside that of two decoding
steps, and what HTTP adds to the time of one image. Needs the extras `serve` and `dev` (for httpx).
"""

import argparse
import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

import httpx

from detailflow import DetailFlowPipeline

PATH = "/v1/images/generations"


@contextmanager
def server(max_batch: int, model: list[str]) -> Iterator[str]:
    """Start the command; yield its address."""
    command = [sys.executable, "-m", "detailflow", "serve", "--port", "0", "--max-batch", str(max_batch), *model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+:\d+", process.stdout.readline())
        if not found:
            sys.exit("the server did not start")
        try:
            yield found[0]
        finally:
            process.terminate()


async def load(url: str, clients: int, seconds: float) -> list[float]:
    """Let clients ask for images for some seconds; return the latency of each."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def ask(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            while (started := time.perf_counter()) < end:
                answer = await client.post(PATH, json={"prompt": str(number % 10), "seed": len(latencies)})
                answer.raise_for_status()
                latencies.append(time.perf_counter() - started)

    await asyncio.gather(*(ask(i) for i in range(clients)))
    return latencies


def first_partial(client: httpx.Client) -> float:
    """Return the seconds to the first partial image."""
    started, seconds = time.perf_counter(), 0.0
    with client.stream("POST", PATH, json={"prompt": "0", "stream": True, "partial_images": 3}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: ") and "partial" in line[:60]:
                seconds = seconds or time.perf_counter() - started
    return seconds


def two_steps(pipeline: DetailFlowPipeline) -> float:
    """Return the seconds of two decoding steps and the image that they show, in this process."""
    counts = [pipeline.tokenizer.schedule.valid_counts[1]]
    started = time.perf_counter()
    next(pipeline.stream(0, counts=counts))
    return time.perf_counter() - started


def timed(run: object, *args: object) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    run(*args)  # type: ignore[operator]
    return time.perf_counter() - started


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-batch", type=int, default=16)
    args = parser.parse_args()
    model = ["--model", args.model] if args.model else []

    with ExitStack() as stack:
        urls = {size: stack.enter_context(server(size, model)) for size in (1, args.max_batch)}
        print(f"{'clients':>8} {'max batch':>10} {'images/s':>9} {'p50 ms':>8} {'p95 ms':>8}")
        for clients in args.clients:
            results: dict[int, list[list[float]]] = {size: [] for size in urls}
            for _ in range(args.rounds):
                for size, url in urls.items():
                    results[size].append(asyncio.run(load(url, clients, args.seconds)))
            for size, rounds in results.items():
                latencies = sorted(seconds for found in rounds for seconds in found)
                rate = median(clients * len(found) / sum(found) for found in rounds)
                p50, p95 = (latencies[int(part * (len(latencies) - 1))] * 1e3 for part in (0.5, 0.95))
                print(f"{clients:>8} {size:>10} {rate:>9.2f} {p50:>8.1f} {p95:>8.1f}", flush=True)

        pipeline = DetailFlowPipeline.from_pretrained(args.model)
        names = ("first partial image", "two steps, no HTTP", "one image", "one image, no HTTP")
        times: dict[str, list[float]] = {name: [] for name in names}
        with httpx.Client(base_url=urls[args.max_batch], timeout=300) as client:
            for _ in range(10 * args.rounds):
                measured = (
                    first_partial(client),
                    two_steps(pipeline),
                    timed(lambda: client.post(PATH, json={"prompt": "0", "seed": 1}).raise_for_status()),
                    timed(lambda: pipeline(0, seed=1)),
                )
                for name, seconds in zip(names, measured, strict=True):
                    times[name].append(seconds)
        print("\nmedian of one client, in alternation with the pipeline in another process")
        for name, found in times.items():
            print(f"{name:>22}: {median(found) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
