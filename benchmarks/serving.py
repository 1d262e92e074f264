"""Throughput and latency of `detailflow serve` on this machine, with batches and without, in alternation.

    python benchmarks/serving.py [--model DIR] [--clients 1 4 16 64] [--seconds 10] [--rounds 3]

Each client asks for one image after the other. Also: the time to the first partial image beside that of two decoding
steps, what HTTP adds to the time of one image, and the same images by the pipeline alone. Processor time says what an
image costs even where other programs take the processor away (Linux). Needs the extras `serve` and `dev` (for httpx).
"""

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import httpx

from detailflow import DetailFlowPipeline

PATH = "/v1/images/generations"
PAUSE = 0.3  # seconds in which the threads of what came before go to sleep: else the pipeline would be measured warm


class Served:
    """The command `detailflow serve` with these options, while the context lasts; `url` is its address."""

    def __init__(self, options: list[str]) -> None:
        self.options, self.port = options, 0

    def restart(self) -> None:
        """Start the process, at the same port as before."""
        command = [sys.executable, "-m", "detailflow", "serve", "--port", str(self.port), *self.options]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._errors, text=True)
        assert self.process.stdout is not None
        found = re.search(r"http://\S+:(\d+)", self.process.stdout.readline())
        if not found:
            sys.exit(f"the server did not start: {' '.join(self.errors())}")
        self.url, self.port = found[0], int(found[1])

    def errors(self) -> list[str]:
        """Return the lines that the process has written as errors."""
        self._errors.seek(0)
        return self._errors.read().splitlines()

    def __enter__(self) -> "Served":
        self.restart()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def cpu_seconds(self) -> float:
        """Return the processor time that it has used (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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


def timed(run: Callable[..., object], *args: object) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    run(*args)
    return time.perf_counter() - started


def of_pipeline(pipeline: DetailFlowPipeline, images: int) -> list[float]:
    """Return images per second and processor milliseconds of an image of one batch, without HTTP."""
    wall, cpu = time.perf_counter(), time.process_time()
    pipeline(0, num_images_per_class=images, seed=1)
    return [images / (time.perf_counter() - wall), (time.process_time() - cpu) / images * 1e3]


def throughput(args: argparse.Namespace, servers: dict[int, Served], pipeline: DetailFlowPipeline) -> None:
    """Print the table of clients and batches, and what the pipeline alone does."""
    print(f"{'clients':>8} {'max batch':>10} {'images/s':>9} {'p50 ms':>8} {'p95 ms':>8} {'CPU ms/image':>13}")
    alone: dict[int, list[list[float]]] = {size: [] for size in servers}
    for clients in args.clients:
        latencies: dict[int, list[float]] = {size: [] for size in servers}
        rates: dict[int, list[float]] = {size: [] for size in servers}
        costs: dict[int, list[float]] = {size: [] for size in servers}
        for _ in range(args.rounds):
            for size, served in servers.items():
                wall, cpu = time.perf_counter(), served.cpu_seconds()
                found = asyncio.run(load(served.url, clients, args.seconds))
                latencies[size] += found
                rates[size].append(len(found) / (time.perf_counter() - wall))
                costs[size].append((served.cpu_seconds() - cpu) / len(found) * 1e3)
                alone[size].append(of_pipeline(pipeline, size))
        for size in servers:
            ordered = sorted(latencies[size])
            p50, p95 = (ordered[int(part * (len(ordered) - 1))] * 1e3 for part in (0.5, 0.95))
            rate, cost = median(rates[size]), median(costs[size])
            print(f"{clients:>8} {size:>10} {rate:>9.2f} {p50:>8.1f} {p95:>8.1f} {cost:>13.1f}", flush=True)
    for size, found in alone.items():
        rate, cost = (median(values) for values in zip(*found, strict=True))
        print(f"{'no HTTP':>8} {size:>10} {rate:>9.2f} {'':>8} {'':>8} {cost:>13.1f}")


def latency(url: str, pipeline: DetailFlowPipeline, repeats: int) -> None:
    """Print the time to the first partial image and what HTTP adds to an image."""
    names = ("first partial image", "two steps, no HTTP", "one image", "one image, no HTTP")
    times: dict[str, list[float]] = {name: [] for name in names}
    with httpx.Client(base_url=url, timeout=300) as client:
        for _ in range(repeats):
            measured: tuple[Callable[[], float], ...] = (
                lambda: first_partial(client),
                lambda: two_steps(pipeline),
                lambda: timed(lambda: client.post(PATH, json={"prompt": "0", "seed": 1}).raise_for_status()),
                lambda: timed(lambda: pipeline(0, seed=1)),
            )
            for name, measure in zip(names, measured, strict=True):
                time.sleep(PAUSE)
                times[name].append(measure())
    print("\none client, in alternation with the pipeline in another process")
    for name, found in times.items():
        print(f"{name:>22}: median {median(found) * 1e3:.1f} ms, best {min(found) * 1e3:.1f} ms")


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
        servers = {
            size: stack.enter_context(Served(["--max-batch", str(size), *model])) for size in (1, args.max_batch)
        }
        pipeline = DetailFlowPipeline.from_pretrained(args.model)
        pipeline(0, seed=1)
        throughput(args, servers, pipeline)
        latency(servers[args.max_batch].url, pipeline, 10 * args.rounds)


if __name__ == "__main__":
    main()
