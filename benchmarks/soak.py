"""Load `detailflow serve` for minutes with all kinds of clients, and check that nothing is lost and nothing leaks.

    python benchmarks/soak.py [--clients 64] [--seconds 600] [--kill-every S] [--model DIR] [options of serve]

Of the requests, most want images, plain or streamed; a tenth of the clients leave midway, others read slowly or send
what is wrong. At the end a sample of the completed images is computed again by the pipeline in this process. With
`--kill-every`, the server is killed (SIGKILL) and started again every S seconds: then requests may fail, but what
arrives as an image must still be a whole one. Exits with status 1 if anything is not as it should be. Needs Linux and
the extras `serve` and `dev` (for httpx).
"""

import argparse
import asyncio
import base64
import io
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any

import httpx
import numpy as np
from PIL import Image

from detailflow import DetailFlowPipeline

sys.path.append(str(Path(__file__).parent))
from serving import PATH, Served

SAMPLE = 100  # completed requests that are computed again
WARM = 0.1  # of the time, after which memory is to stay (a minute of ten)
GROWTH = 0.05  # of memory after that
BAD: list[tuple[str, dict[str, Any]]] = [
    (PATH, {"json": {"prompt": "no such class"}}),
    (PATH, {"json": {"prompt": "0", "n": 0}}),
    (PATH, {"json": {"prompt": "0", "temperature": "hot"}}),
    (PATH, {"content": b"{", "headers": {"Content-Type": "application/json"}}),
    ("/v1/images/edits", {"data": {"prompt": "0"}, "files": {"image": b"no image"}}),
    ("/v1/tokens/decode", {"json": {"tokens": [-1]}}),
    ("/v1/nothing", {"json": {}}),
]
Request = dict[str, Any]


class Soak:
    """What the clients ask for, and what became of it."""

    def __init__(self, url: str, model: dict[str, Any], may_fail: bool) -> None:
        self.url, self.classes, self.may_fail = url, model["num_classes"], may_fail
        self.counts = [stage["num_tokens"] for stage in model["stages"]]
        self.outcomes, self.problems = Counter[str](), list[str]()
        self.sample, self.completed, self.rng = list[tuple[Request, list[str]]](), 0, Random(0)

    async def client(self, number: int, end: float) -> None:
        """Ask until `end`, as a client of its own seed."""
        rng, kinds = Random(number), (self.plain, self.stream, self.slow, self.leave, self.bad)
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as http:
            while time.monotonic() < end:
                (kind,) = rng.choices(kinds, (60, 10, 10, 10, 10))
                try:
                    self.outcomes[await kind(http, rng)] += 1
                except httpx.HTTPError as error:
                    self.outcomes["failed"] += 1
                    if not self.may_fail:
                        self.problems.append(f"{kind.__name__}: {error!r}")
                    await asyncio.sleep(0.2)
                except (OSError, SyntaxError, ValueError, KeyError) as error:
                    self.problem(f"{kind.__name__} got what is not a whole image: {error!r}")

    def request(self, rng: Random, **more: Any) -> Request:
        """Return a request for one or two images of any class, some of them coarse."""
        number = rng.choice((1, 1, 1, 2))
        body = {"prompt": str(rng.randrange(self.classes)), "n": number, "seed": rng.randrange(2**32)}
        return body | ({"num_tokens": rng.choice(self.counts)} if rng.random() < 0.2 else {}) | more

    async def plain(self, http: httpx.AsyncClient, rng: Random) -> str:
        """Ask for images in one answer."""
        body = self.request(rng)
        answer = await http.post(PATH, json=body)
        if answer.status_code != 200:
            return await self.refused(answer)
        return self.check(body, [image["b64_json"] for image in answer.json()["data"]], "completed")

    async def stream(self, http: httpx.AsyncClient, rng: Random, pause: float = 0.0) -> str:
        """Ask for images as a stream, and read it to its end."""
        body, images = self.request(rng, stream=True, partial_images=3), dict[int, str]()
        async with http.stream("POST", PATH, json=body) as answer:
            if answer.status_code != 200:
                return await self.refused(answer)
            async for event in events(answer):
                if event["type"] == "error":
                    return self.problem(f"a stream had the error {event}")
                whole(event["b64_json"])
                if event["type"].endswith("completed"):
                    images[event["image_index"]] = event["b64_json"]
                await asyncio.sleep(pause)
        return self.check(body, [images[i] for i in sorted(images)], "completed, slowly" if pause else "streamed")

    async def slow(self, http: httpx.AsyncClient, rng: Random) -> str:
        """Read a stream slowly."""
        return await self.stream(http, rng, pause=0.5)

    async def leave(self, http: httpx.AsyncClient, rng: Random) -> str:
        """Go away midway: after the first coarse image, or at any time."""
        if rng.random() < 0.5:
            async with http.stream("POST", PATH, json=self.request(rng, stream=True, partial_images=9)) as answer:
                async for _ in events(answer):
                    return "left"
            return "left"
        try:
            async with asyncio.timeout(rng.uniform(0, 2)):
                return await self.plain(http, rng)
        except TimeoutError:
            return "left"

    async def bad(self, http: httpx.AsyncClient, rng: Random) -> str:
        """Send what is wrong."""
        path, options = rng.choice(BAD)
        answer = await http.post(path, **options)
        if answer.status_code not in (400, 404):
            return self.problem(f"{path} with {options} got {answer.status_code}")
        return "bad request"

    async def refused(self, answer: httpx.Response) -> str:
        """Take a refusal for what it is, and wait as it says."""
        await answer.aread()
        if answer.status_code != 429 and not (self.may_fail and answer.status_code == 503):
            return self.problem(f"status {answer.status_code}: {answer.text[:200]}")
        await asyncio.sleep(float(answer.headers.get("Retry-After", 1)))
        return "refused, tried again"

    def check(self, body: Request, images: list[str], outcome: str) -> str:
        """Check that all images are there and whole; keep some of them."""
        if len(images) != body["n"]:
            return self.problem(f"{len(images)} images in place of {body['n']}")
        for image in images:
            whole(image)
        self.completed += 1
        if len(self.sample) < SAMPLE:
            self.sample.append((body, images))
        elif (place := self.rng.randrange(self.completed)) < SAMPLE:
            self.sample[place] = body, images
        return outcome

    def problem(self, what: str) -> str:
        """Note what should not be."""
        self.problems.append(what)
        return "problem"

    def compare(self, pipeline: DetailFlowPipeline) -> int:
        """Compute the sample again; return how many images there are in it."""
        total = 0
        for body, images in self.sample:
            options = {"seed": body["seed"], "num_tokens": body.get("num_tokens")}
            for expected, image in zip(
                pipeline(int(body["prompt"]), num_images_per_class=body["n"], **options), images, strict=True
            ):
                found = whole(image)
                if found.size != expected.size or abs(np.asarray(found, int) - np.asarray(expected, int)).max() > 1:
                    self.problem(f"an image of {body} is not the pipeline's")  # but for rounding in another batch
                total += 1
        return total


def whole(b64: str) -> Image.Image:
    """Return a PNG image, all of whose pixels and checksums are there."""
    content = base64.b64decode(b64, validate=True)
    Image.open(io.BytesIO(content)).verify()
    return Image.open(io.BytesIO(content)).convert("RGB")


async def events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a stream."""
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def resident(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


async def every(seconds: float, until: float, do: Callable[[], Awaitable[None]]) -> None:
    """Do something at regular times."""
    while time.monotonic() + seconds < until:
        await asyncio.sleep(seconds)
        await do()


async def run(served: Served, clients: int, seconds: float, kill_every: float | None) -> tuple[Soak, list[float]]:
    """Let clients ask for some time; return what became of it, and the server's memory in MB over time."""
    model = httpx.get(f"{served.url}/v1/models", timeout=60).json()["data"][0]
    soak, memory = Soak(served.url, model, kill_every is not None), list[float]()
    end = time.monotonic() + seconds

    async def measure() -> None:
        memory.append(resident(served.process.pid))

    async def kill() -> None:
        served.process.kill()
        await asyncio.to_thread(served.restart)

    background = every(kill_every, end, kill) if kill_every else every(min(1, seconds / 20), end, measure)
    await asyncio.gather(background, *(soak.client(number, end) for number in range(clients)))
    return soak, memory


def soaked(options: argparse.Namespace, more: list[str]) -> list[str]:
    """Run one soak, print what came out, and return the problems."""
    model = ["--model", options.model] if options.model else []
    with Served([*model, *more]) as served:
        started = time.monotonic()
        soak, memory = asyncio.run(run(served, options.clients, options.seconds, options.kill_every))
        took = time.monotonic() - started
        metrics = httpx.get(f"{served.url}/metrics", timeout=60).text
        waiting = next(line for line in metrics.splitlines() if line.startswith("detailflow_queue_images "))
        errors = [] if options.kill_every else served.errors()
    killed = f", killed every {options.kill_every} s" if options.kill_every else ""
    print(f"{options.clients} clients for {took:.0f} s{killed}")
    for outcome, number in soak.outcomes.most_common():
        print(f"{number:>8} {outcome}")
    compared = soak.compare(DetailFlowPipeline.from_pretrained(options.model, device="cpu"))
    print(f"{compared:>8} images of {len(soak.sample)} completed requests computed again, and compared")
    if memory:
        warm = memory[int(WARM * len(memory)) :]
        early, late = warm[0], max(warm)
        print(f"memory: {early:.0f} MB after {WARM:.0%} of the time, at most {late:.0f} MB after that")
        if late > (1 + GROWTH) * early:
            soak.problem(f"memory grew by {late / early - 1:.0%}")
    soak.problems += [f"the server wrote {line}" for line in errors]
    if not soak.completed:
        soak.problem("no request was completed")
    print(waiting)
    if not waiting.endswith(" 0.0"):
        soak.problem("something stayed in the queue")
    return soak.problems


def main(argv: list[str] | None = None) -> int:
    """Print the outcomes; 1 if there are problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--kill-every", type=float, metavar="S")
    problems = soaked(*parser.parse_known_args(argv))
    print(*problems[:20], sep="\n", file=sys.stderr)
    print("all is as it should be" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
