"""`detailflow COMMAND …`: finds the command, and turns bad input into one sentence and exit status 2."""

import errno
import io
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from _thread import interrupt_main
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

from detailflow import __version__
from detailflow.errors import DetailFlowError, DetailFlowWarning, ReportedElsewhereError, missing_package
from detailflow.words import printable, shown, unknown

COMMANDS = {  # each is the module of that name in this package, imported when asked for
    "generate": "make images of classes",
    "classes": "list the classes that a model can make images of",
    "reconstruct": "encode images and decode them again, from coarse to fine",
    "vary": "keep the first tokens of images, write the others again",
    "encode": "write the tokens of images to a file",
    "decode": "make images of the tokens in a file",
    "data": "say what a set of images holds, and what is wrong with it",
    "train": "train a tokenizer or an AR model on your own images",
    "evaluate": "measure models and images: FID, PSNR, …, as a report with plots",
    "bench": "time a model on this machine, beside the machine's own limits",
    "convert": "write models in another layout: safetensors or the published one",
    "export": "write a model as ONNX files, for programs without PyTorch",
    "extract": "write the tokens of a training set, to train an AR model on",
    "serve": "serve a model over HTTP, as OpenAI's images API has it",
}

# Commands that show what the library logs; the standard output of reconstruct is its table.
_SHOW_LOG = {
    "generate": "stderr",
    "train": "stdout",
    "extract": "stdout",
    "evaluate": "stdout",
    "reconstruct": "stderr",
    "vary": "stderr",
    "encode": "stderr",
    "convert": "stderr",
}

_ABOUT_NAMES = (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP)  # errors that `Path.exists` lets through

_EXTRAS = {"serve": "serve", "export": "onnx"}  # that bring the packages of a command; of the others it is "train"

HELP = f"""usage: detailflow COMMAND …

Images as short sequences of tokens, from coarse to fine (arXiv 2505.21473).

commands:
{chr(10).join(f"  {name:12} {text}" for name, text in COMMANDS.items())}

options:
  -h, --help        show this help, or after a command that command's
  --version         show the version
  --max-pixels N    at most N pixels per image (default: 178,956,970)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed from the start: what is printed goes nowhere
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to stop
        sys.stdout.reconfigure(errors="replace")
    usual, warnings.formatwarning = warnings.formatwarning, _warning_line
    try:
        with _no_interrupt_in_imports():
            status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, where a closed pipe can still be caught
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        _close_output()
        return 141
    except KeyboardInterrupt as stop:  # training says at which step
        if argv is None:  # this process ends, and another Ctrl-C while it does would be a traceback
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        print(f"detailflow: {str(stop) or 'interrupted'}", file=sys.stderr)
        status = 130
    except DetailFlowError as error:
        if not isinstance(error, ReportedElsewhereError):
            _report(error)
        status = 2
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _ABOUT_NAMES and error.filename is not None:
            _report(f"cannot use {printable(str(error.filename))}: {error.strerror}")
        elif isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding() != "utf-8":
            name = shown(printable(error.object))
            _report(f"{name} cannot be written in {error.encoding}, this system's encoding: set LC_ALL=C.UTF-8")
        elif _out_of_memory(error):
            _report("there is not enough memory for this: choose smaller batches, images or models")
        elif isinstance(error, OSError) and _output_fails():  # other files have sentences of their own
            _close_output()
            _report(f"the standard output cannot be written: {error.strerror}")
        else:
            _leave_process_group(1, error)
            raise
        status = 2
    finally:
        warnings.formatwarning = usual
    _leave_process_group(status)
    return status


@contextmanager
def _no_interrupt_in_imports() -> Iterator[None]:
    """Let Ctrl-C wait for the end of imports: raised within, libraries in C would drop it or end the process."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    at = frame
    while at is not None and at.f_code is not main.__code__:  # what called us may be a module that is imported
        if at.f_code.co_filename == "<frozen importlib._bootstrap>":
            again = threading.Timer(0.05, interrupt_main)  # which comes back here, or to who handles it by then
            again.daemon = True
            again.start()
            return
        at = at.f_back
    raise KeyboardInterrupt


def _close_output() -> None:
    """Let what is still to be printed go nowhere, or Python would fail at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _output_fails() -> bool:
    """Return whether the standard output takes no more, not even an empty line."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _warning_line(message: object, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """Return our own warnings as sentences, those of libraries with the place they come from."""
    if issubclass(category, DetailFlowWarning):
        return f"detailflow: warning: {' '.join(str(message).split())}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _take_max_pixels(argv: list[str]) -> None:
    """Set what `--max-pixels` says for this process and those that it starts, and take it out of `argv`."""
    for i, item in enumerate(argv):
        name, equals, value = item.partition("=")
        if name != "--max-pixels":
            continue

        from detailflow.data.image_files import MAX_PIXELS_VARIABLE, max_pixels

        if not equals and i + 1 == len(argv):
            raise DetailFlowError("--max-pixels needs a number: the most pixels that an image may have")
        os.environ[MAX_PIXELS_VARIABLE] = value if equals else argv[i + 1]
        del argv[i : i + (1 if equals else 2)]
        max_pixels()  # raises if that is not a number
        return


def _out_of_memory(error: Exception) -> bool:
    """Return whether it is Python's or one of torch's: on a CPU torch has no exception of its own for it."""
    of_torch = isinstance(error, RuntimeError) and "allocate" in str(error) and "memory" in str(error)
    return isinstance(error, MemoryError) or of_torch


def _report(error: object) -> None:
    print(f"detailflow: error: {' '.join(str(error).split())}", file=sys.stderr)


def _leave_process_group(status: int, error: Exception | None = None) -> None:
    """End this process at once if it is one of several: see `distributed.leave`."""
    if "detailflow.distributed" not in sys.modules:  # nor is torch, whose import takes seconds
        return
    from detailflow.distributed import in_group, leave, lost

    if not in_group():
        return
    if error is not None and lost(error):
        _report("another process of this launch has ended: its own message says why")
        status = 2
    elif error is not None:
        traceback.print_exception(error)
    leave(status)


def _run(argv: list[str]) -> int:
    _take_max_pixels(argv)
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if argv[0] == "--version":
        print(f"detailflow {__version__}")
        return 0
    command, *rest = argv
    if command.startswith("-"):
        raise DetailFlowError(
            f"{command} is not a command: options come after the command, as in detailflow COMMAND {command}"
        )
    if command not in COMMANDS:
        raise DetailFlowError(unknown("command", command, COMMANDS, f"the commands are {', '.join(COMMANDS)}"))
    try:
        return _command(command, rest)
    except ModuleNotFoundError as error:  # wherever it is imported
        if error.name is None or error.name.split(".")[0] == "detailflow":
            raise
        package, extra = error.name.split(".")[0], _EXTRAS.get(command, "train")
        raise missing_package(f"detailflow {command}", package, extra=extra) from error


def _command(command: str, rest: list[str]) -> int:
    module = import_module(f"detailflow.cli.{command}")
    if command not in _SHOW_LOG or "--dry-run" in rest or _is_other_rank():
        return module.main(rest)
    logger, lines = logging.getLogger("detailflow"), _Lines(_SHOW_LOG[command])
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        return module.main(rest)
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)


def _is_other_rank() -> bool:
    """Whether this is one of several processes and not the first, without importing torch."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1") and os.environ.get("RANK", "0") != "0"


class _Lines(logging.Handler):
    """Print what the library logs, each line once: what a set of images holds, where a run goes on."""

    def __init__(self, stream: str) -> None:
        super().__init__()
        self.stream, self.printed = stream, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if (line := record.getMessage()) not in self.printed:
            self.printed.add(line)
            stream = "stderr" if record.levelno > logging.INFO else self.stream
            print(line, file=getattr(sys, stream), flush=True)
