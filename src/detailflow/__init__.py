"""DetailFlow: images as 1-D token sequences that run from coarse to fine, and a model that writes such sequences.

The names below are imported on first use, so that `import detailflow` and `detailflow --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from detailflow.errors import DetailFlowError

if TYPE_CHECKING:
    from detailflow.generation import SamplingConfig
    from detailflow.models.gpt import DetailFlowGPT, GPTConfig
    from detailflow.models.layers import ViTConfig
    from detailflow.models.tokenizer import DetailFlowTokenizer, TokenizerConfig
    from detailflow.pipeline import DetailFlowPipeline
    from detailflow.schedule import TokenSchedule

__version__ = "0.1.0"

__all__ = [
    "DetailFlowError",
    "DetailFlowGPT",
    "DetailFlowPipeline",
    "DetailFlowTokenizer",
    "GPTConfig",
    "SamplingConfig",
    "TokenSchedule",
    "TokenizerConfig",
    "ViTConfig",
    "__version__",
]

_LAZY = {
    "DetailFlowGPT": "detailflow.models.gpt",
    "DetailFlowPipeline": "detailflow.pipeline",
    "DetailFlowTokenizer": "detailflow.models.tokenizer",
    "GPTConfig": "detailflow.models.gpt",
    "SamplingConfig": "detailflow.generation",
    "TokenSchedule": "detailflow.schedule",
    "TokenizerConfig": "detailflow.models.tokenizer",
    "ViTConfig": "detailflow.models.layers",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
