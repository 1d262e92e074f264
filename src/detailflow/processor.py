"""What the system says of the processor."""

import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

# Names of lines, with those of ARM's processors, that decide what a compiler makes for this one.
IDENTITY = ("flags", "model name", "Features", "CPU implementer", "CPU part")


@cache
def processor_lines() -> tuple[str, ...]:
    """Return the lines of /proc/cpuinfo, each once; elsewhere than on Linux the one that Python knows."""
    with suppress(OSError):
        return tuple(dict.fromkeys(Path("/proc/cpuinfo").read_text("utf-8").splitlines()))
    return (platform.processor(),)


def is_intel() -> bool:
    """Return whether it is one of Intel's."""
    return any("GenuineIntel" in line for line in processor_lines())


def processor_name() -> str:
    """Return the model's name."""
    named = (line.partition(":")[2].strip() for line in processor_lines() if line.startswith("model name"))
    return next(named, None) or platform.processor() or platform.machine()


def processor_identity() -> str:
    """Return text that differs for processors that need other machine code."""
    lines = processor_lines()
    return "\n".join(sorted({line for line in lines if line.startswith(IDENTITY)} or lines))


def multiplies_bfloat16_fast() -> bool:
    """Return whether it is faster with bfloat16 matrices than with float32: with AMX, or AMD's since Zen 4.

    On others a training step takes 1.3 to 3.3 times as long as in float32 (docs/speed.md#precision).
    """
    known = "\n".join(processor_lines())
    return has_amx() or ("avx512_bf16" in known and "AuthenticAMD" in known)


def has_amx() -> bool:
    """Return whether it has a unit for products of bfloat16 matrices."""
    return any("amx_bf16" in line for line in processor_lines())
