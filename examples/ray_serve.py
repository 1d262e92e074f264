"""The service on many machines: `detailflow serve` as a Ray Serve deployment, with one model in each replica.

    pip install '.[ray]'
    python examples/ray_serve.py --max-replicas 4 --gpus 1         # a GPU for each replica; 0 computes on CPUs
    serve run examples.ray_serve:application max_replicas=4 gpus=1   # the same on a Ray cluster

Ray starts more replicas while each has more than `--requests` requests at once, and stops those that are idle. Every
replica has its own queue and batches, as a single server has, and all answer at one address. Keys, limits and answers
are those of docs/serve.md; `/metrics` is that of whichever replica answers.
"""

import argparse
import os
import time
from dataclasses import dataclass, fields

from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions


@dataclass(frozen=True)
class Options:
    """What a deployment needs to know."""

    model: str = ""  # a folder that every machine has, or a hub name; the shipped model if empty
    min_replicas: int = 1
    max_replicas: int = 2
    gpus: float = 0  # for each replica
    cpus: float = 1
    requests: int = 16  # at once for each replica, before there is another one


def build(model: str, cpus: float) -> FastAPI:
    """Load the model and return the app: in the process of each replica."""
    import torch

    from detailflow import DetailFlowPipeline
    from detailflow.serving.app import create_app
    from detailflow.serving.options import ServeConfig

    torch.set_num_threads(max(1, int(cpus)))
    config = ServeConfig(
        model_name=os.path.basename(model) or "detailflow", api_key=os.environ.get("DETAILFLOW_API_KEY")
    )
    return create_app(DetailFlowPipeline.from_pretrained(model or None), config)


def application(given: dict[str, str]) -> serve.Application:
    """Return the deployment; `given` are `Options` by name, as `serve run` has them from its command line."""
    kinds = {field.name: type(field.default) for field in fields(Options)}
    options = Options(**{name: kinds[name](value) for name, value in given.items()})
    deployment = serve.deployment(
        serve.ingress(lambda: build(options.model, options.cpus))(),
        name="detailflow",
        max_ongoing_requests=4 * options.requests,  # Ray's queue is long enough for full batches
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.requests,
        ),
        ray_actor_options={"num_gpus": options.gpus, "num_cpus": options.cpus},
    )
    return deployment.bind()


def main() -> None:
    """Serve on a Ray of this machine until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Options):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, default=field.default, type=type(field.default), help=f"default: {field.default!r}")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = vars(parser.parse_args())
    host, port = given.pop("host"), given.pop("port")
    if host not in ("127.0.0.1", "localhost", "::1") and not os.environ.get("DETAILFLOW_API_KEY"):
        parser.error(f"{host} can be reached by others: set a key in the environment variable DETAILFLOW_API_KEY")
    serve.start(http_options=HTTPOptions(host=host, port=port))
    serve.run(application(given), name="detailflow")
    print(f"serving at http://{host}:{port}", flush=True)
    try:
        while True:
            time.sleep(60)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    main()
