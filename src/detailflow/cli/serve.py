"""`detailflow serve`: the model over HTTP."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from detailflow.cli.common import Parser, add_model_options
from detailflow.errors import DetailFlowError
from detailflow.serving.options import ServeConfig, Timeout, Window, check_queue
from detailflow.settings import BatchSize, PositiveInt, at_most

KEY_VARIABLE = "DETAILFLOW_API_KEY"
SHIPPED_NAME = "detailflow-cifar10"
Megabytes = Annotated[PositiveInt, at_most(2047)]  # as bytes they are a `PositiveInt`, too


def parser() -> Parser:
    """Return the command's parser."""
    result = Parser(
        "serve", "[--model MODEL]", "Serve a model over HTTP, as OpenAI's images API has it (see /docs there)."
    )
    result.option("--host", str, "127.0.0.1", "where to listen (default: 127.0.0.1, this machine alone)")
    result.option("--port", int, 8000, "0 is any free one (default: 8000)")
    key = f"environment variable with the key (default: {KEY_VARIABLE}, if set)"
    result.option("--api-key", help=key, metavar="VARIABLE")
    result.option("--no-auth", bool, help="ask for no key, even beyond this machine")
    result.option("--access-log", bool, help="a line for each request")
    result.heading("batches")
    result.option("--max-batch", BatchSize, ServeConfig.max_batch, "images at once", "N")
    window = "wait so long for a fuller batch while several clients ask"
    result.option("--batch-window", Window, ServeConfig.batch_window, window, "MS")
    result.heading("limits")
    result.option("--max-queue", PositiveInt, ServeConfig.max_queue, "images that may wait: --max-images or more", "N")
    result.option("--max-images", PositiveInt, ServeConfig.max_images, "images of a request", "N")
    result.option("--max-upload", Megabytes, ServeConfig.max_upload // 2**20, "of an uploaded image", "MB")
    result.option("--timeout", Timeout, ServeConfig.timeout, "seconds for a request", "S")
    add_model_options(result, tokenizer=True)
    result.option("--model-name", help="what clients call the model", metavar="NAME")
    return result


def main(argv: Sequence[str]) -> int:
    """Serve until the process is told to stop."""
    args = parser().parse_args(argv)
    check_queue(args.max_queue, args.max_images, "--max-queue", "--max-images")
    # Before torch is imported: threads that spin while they wait would take the cores from each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from detailflow.data.image_files import MAX_PIXELS_VARIABLE, max_pixels
    from detailflow.pipeline import DetailFlowPipeline
    from detailflow.serving.app import create_app
    from detailflow.serving.runner import warm_up
    from detailflow.serving.server import Server, is_loopback, listen, url

    pixels = max_pixels() if MAX_PIXELS_VARIABLE in os.environ else ServeConfig.max_pixels
    os.environ[MAX_PIXELS_VARIABLE] = str(2 * pixels)  # for images within images; a pixel of WebP counts twice
    config = ServeConfig(
        model_name=_model_name(args.model_name, args.model),
        api_key=_api_key(args.api_key, args.no_auth),
        max_batch=args.max_batch,
        batch_window=args.batch_window,
        max_queue=args.max_queue,
        max_images=args.max_images,
        max_upload=args.max_upload * 2**20,
        max_pixels=pixels,
        timeout=args.timeout,
        cross_site=args.no_auth,
    )
    with listen(args.host, args.port) as listener:
        if config.api_key is None and not args.no_auth and not is_loopback(listener):
            raise DetailFlowError(
                f"{args.host} can be reached by others: set a key in the environment variable {KEY_VARIABLE}, "
                "or say --no-auth if anybody may use this server"
            )
        pipeline = DetailFlowPipeline.from_pretrained(
            args.model, device=args.device, dtype=args.dtype, tokenizer=args.tokenizer, engine=args.engine
        )
        warm_up(pipeline)
        app = create_app(pipeline, config)
        address = url(listener)
        print(f"serving {config.model_name}: the studio at {address}, the API at {address}/docs", flush=True)
        server = Server(app, args.access_log)
        server.run([listener])
    if server.interrupted:
        raise KeyboardInterrupt
    return 0


def _api_key(variable: str | None, no_auth: bool) -> str | None:
    """Return the key from the environment: an option's value could be read by every user of the machine."""
    if no_auth:
        if variable is not None:
            raise DetailFlowError("--api-key and --no-auth contradict each other: give one of them")
        return None
    if variable == "":
        raise DetailFlowError("--api-key is empty: name the environment variable that has the key, or leave it out")
    name = KEY_VARIABLE if variable is None else variable
    key = os.environ.get(name)
    if key is None and variable is not None:
        raise DetailFlowError(f"--api-key names the environment variable {variable!r}, which is not set")
    if key == "":
        advice = "give it the key" if variable else "give it the key, or unset it to ask for none"
        raise DetailFlowError(f"the environment variable {name} is empty: {advice}")
    return key


def _model_name(name: str | None, model: str | None) -> str:
    """Return what clients call the model: never a path of this machine."""
    if name is None:
        name = SHIPPED_NAME if model is None else Path(model).resolve().name if os.path.exists(model) else model
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*(@[\w./-]+)?", name):
        raise DetailFlowError(
            f"{name!r} cannot be a model's name: give letters, digits, '.', '-' and '_' as --model-name"
        )
    return name
