"""The sampling settings, the one place that names, documents and checks them. Without torch, so that help is quick."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypedDict, Unpack

from detailflow.settings import Must, Settings, at_most

# What takes the decoding steps: C++ on a CPU, CUDA graphs, or PyTorch; "auto" is the first of them that can.
EngineName = Literal["auto", "native", "graphs", "torch"]
GuidanceSchedule = Literal["constant", "linear"]
OFF: Literal["off"] = "off"  # a top-k or top-p that keeps all codes, whatever the model's own best is


class SamplingOptions(TypedDict, total=False):
    """Values in place of a model's own `SamplingConfig`; `None` changes nothing."""

    guidance_scale: float | None
    guidance_schedule: str | None
    temperature: float | None
    top_k: int | Literal["off"] | None
    top_p: float | Literal["off"] | None


@dataclass(frozen=True)
class SamplingConfig(Settings):
    """How tokens are drawn from logits (docs/method.md#sampling).

    >>> SamplingConfig(guidance_scale=2.0, top_k=100).guided
    True

    Attributes:
        guidance_scale: strength of the class; 1 is no guidance.
        guidance_schedule: constant, or linear: lower from group to group.
        temperature: 0 always takes the most likely code.
        top_k: draw from the K most likely codes, or off.
        top_p: from the most likely ones that sum to P, or off.
    """

    guidance_scale: Annotated[  # a larger one may leave float32 when it scales a difference of logits
        float, Must("0 or more (1 is no guidance), at most 1e+06", lambda scale: 0 <= scale <= 1e6)
    ] = 1.5
    guidance_schedule: GuidanceSchedule = "constant"
    temperature: Annotated[float, Must("0 (argmax) or more", lambda value: 0 <= value < float("inf"))] = 1.0
    top_k: Annotated[int, Must("0 or more (0 is off)", lambda k: k >= 0), at_most(2**31 - 1)] | None = None
    top_p: Annotated[float, Must("above 0 and at most 1 (1 is off)", lambda p: 0 < p <= 1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k == 0:
            object.__setattr__(self, "top_k", None)

    @property
    def guided(self) -> bool:
        """Whether the null class has to be computed at all."""
        return self.guidance_scale != 1

    def updated(self, **options: Unpack[SamplingOptions]) -> "SamplingConfig":
        """Return these settings with the given ones in their place; "off", or a top-k of 0, is none."""
        given: dict[str, Any] = {
            name: None if value == OFF else value for name, value in options.items() if value is not None
        }
        return replace(self, **given)
