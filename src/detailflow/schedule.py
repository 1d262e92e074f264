"""Token order and resolutions (Sec. 3.2 and 3.3; docs/method.md#groups, #resolution-map).

The paper's symbols: N tokens in groups of g, the first c of them one by one; n tokens stand for an image at resolution
R(n), decoded at side D(n), a multiple of the patch size f.
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import Tensor

from detailflow.errors import DetailFlowError
from detailflow.settings import Must, PositiveInt, Settings, checked

LARGEST_ALPHA = 20  # beyond, R(n) jumps from 1 to R, and its powers leave floating-point numbers


@dataclass(frozen=True)
class TokenSchedule(Settings):
    """The order of the tokens and the resolution that each number of them stands for.

    >>> schedule = TokenSchedule(num_tokens=128, group_size=8, causal_tokens=8, image_size=256, patch_size=16)
    >>> schedule.resolution(16), schedule.decode_size(16), len(schedule.steps)
    (44, 48, 23)

    Args:
        num_tokens: N, tokens of a full image; a multiple of `group_size`.
        group_size: g, tokens predicted in parallel.
        causal_tokens: c, length of the prefix predicted token by token, a multiple of g; `None` is g. With 0 the first
            group is predicted at once as the others are (the paper's table 2 before "first group causal").
        image_size: R, side of a full image in pixels; a multiple of `patch_size`.
        patch_size: f, side of a patch in pixels.
        alpha: exponent of the resolution map.
    """

    num_tokens: PositiveInt
    group_size: PositiveInt
    causal_tokens: Annotated[int, Must("0 or a positive integer", lambda c: c >= 0)] | None
    image_size: PositiveInt
    patch_size: PositiveInt
    alpha: Annotated[float, Must(f"above 0 and at most {LARGEST_ALPHA}", lambda alpha: 0 < alpha <= LARGEST_ALPHA)] = (
        1.5
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.causal_tokens is None:
            object.__setattr__(self, "causal_tokens", self.group_size)
        n, g, c = self.num_tokens, self.group_size, self.num_causal
        if n % g:
            raise DetailFlowError(f"group_size must divide num_tokens, and {g} does not divide {n}")
        if c % g or c > n:
            raise DetailFlowError(
                f"causal_tokens must be a multiple of group_size ({g}) and at most num_tokens ({n}), not {c}"
            )
        if self.image_size % self.patch_size:
            raise DetailFlowError(
                f"patch_size must divide image_size, and {self.patch_size} does not divide {self.image_size}"
            )

    @property
    def num_causal(self) -> int:
        """c, the number of tokens that are predicted one at a time."""
        return self.causal_tokens  # type: ignore[return-value]  # never None after __post_init__

    @cached_property
    def valid_counts(self) -> tuple[int, ...]:
        """1, 2, …, c, then multiples of g up to N."""
        return (
            *range(1, self.num_causal + 1),
            *range(self.num_causal + self.group_size, self.num_tokens + 1, self.group_size),
        )

    @property
    def quarter(self) -> int:
        """The largest valid count of at most N/4, else the first: what variations keep unless told otherwise."""
        return max(n for n in self.valid_counts if n == self.valid_counts[0] or 4 * n <= self.num_tokens)

    @cached_property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of each decoding step's tokens: c single tokens, then whole groups (docs/method.md#groups)."""
        return tuple(zip((0, *self.valid_counts[:-1]), self.valid_counts, strict=True))

    def check_count(self, n: int | None, name: str = "num_tokens") -> int:
        """Check that `n` is a valid count and return it; `None` is N. An error calls it `name`."""
        if n is None:
            return self.num_tokens
        if (n := checked(name, n, int)) not in self.valid_counts:
            single = f"1 to {self.num_causal} or " if self.num_causal else ""
            raise DetailFlowError(
                f"{name} must be {single}a multiple of {self.group_size} up to {self.num_tokens}, not {n}"
            )
        return n

    def check_all(self, n: int, what: str, name: str = "num_tokens") -> None:
        """Check that `n` is all tokens, for what needs these."""
        if n != self.num_tokens:
            raise DetailFlowError(f"{what} is for all {self.num_tokens} tokens together: leave out {name}")

    def _number(self, n: int, first: int) -> int:
        """Return a number of tokens, whether they end a decoding step or not."""
        if not first <= (number := int(checked("n", n, int))) <= self.num_tokens:
            raise DetailFlowError(f"n must be {first} to {self.num_tokens} tokens, not {number}")
        return number

    def stages(self, n: int | None = None) -> list[int]:
        """Return the valid powers of two below n, then n (`None` is N): stages that show how an image takes shape."""
        last = self.check_count(n)
        return [k for k in self.valid_counts if k < last and k.bit_count() == 1] + [last]

    def check_prefix(self, length: int, num_tokens: int) -> None:
        """Check the number of tokens that are kept of `num_tokens`."""
        if self.check_count(length, "the length of prefix") > num_tokens:
            raise DetailFlowError(f"num_tokens must be at least the {length} tokens of prefix, not {num_tokens}")

    def check_counts(self, counts: Iterable[int] | None, *, first: int = 1, last: int | None = None) -> list[int]:
        """Return valid counts from `first` to `last`, perhaps none; `None` is all of them, or N."""
        last = self.check_count(last)
        if counts is None:
            return [n for n in self.valid_counts if first <= n <= last]
        if not isinstance(counts, Iterable):
            raise DetailFlowError(
                f"counts must be a list of numbers of tokens, such as [1, {self.num_tokens}], not {counts!r}"
            )
        checked_counts = [self.check_count(n, "each of counts") for n in counts]
        for n in checked_counts:
            if n > last:
                raise DetailFlowError(f"each of counts must be at most num_tokens, which is {last}, not {n}")
            if n < first:
                raise DetailFlowError(f"each of counts must be at least the {first} tokens of prefix, not {n}")
        return checked_counts

    def resolution(self, n: int) -> int:
        """Return R(n), the resolution in pixels that n tokens, 1 to N, stand for (Sec. 3.2, Eq. 4)."""
        n = self._number(n, 1)
        if self.num_tokens == 1:
            return self.image_size
        r, last = self.image_size, self.num_tokens - 1
        value = r - (r - 1) / last**self.alpha * (self.num_tokens - n) ** self.alpha
        return min(max(int(value), 1), r)

    def decode_size(self, n: int) -> int:
        """Return D(n), the side in pixels at which n tokens are decoded: R(n) rounded up to a multiple of f."""
        return self.decode_shape(n, self.image_size, self.image_size)[0]

    def decode_shape(self, n: int, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) at which n tokens of an image that is not square are decoded.

        Each is R(n)/R of its full side, rounded up to a multiple of f; R stands for √(height·width) there.
        """
        r, unit = self.resolution(n), self.image_size * self.patch_size
        rows, columns = (-(-side * r // unit) * self.patch_size for side in (height, width))
        return rows, columns

    def full_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width), multiples of f, at which an image of another shape is encoded.

        It is the image's own if its area is near R × R, else about that area in its own aspect ratio.
        """
        f, area = self.patch_size, self.image_size**2
        if height == width:
            return self.image_size, self.image_size
        if height % f == width % f == 0 and 0.6 <= height * width / area <= 1.6:
            return height, width
        ideal = (area * height / width) ** 0.5, (area * width / height) ** 0.5
        rows, columns = (min(max(round(side / f) * f, f), area // f) for side in ideal)
        return rows, columns

    def is_full_shape(self, height: int, width: int) -> bool:
        """Return whether `full_shape` can be (height, width)."""
        bounded = min(height, width) > 0 and max(height, width) <= self.image_size**2
        return bounded and self.full_shape(height, width) == (height, width)

    def check_full_shape(self, size: Any) -> tuple[int, int]:
        """Return a `size` that `full_shape` can be, (height, width)."""
        try:
            height, width = map(operator.index, size)
        except (TypeError, ValueError):
            raise DetailFlowError(f"size must be (height, width), both integers, not {size!r:.100}") from None
        if not self.is_full_shape(height, width):
            raise DetailFlowError(f"no image is encoded at a size of {size}: see TokenSchedule.full_shape")
        return height, width

    def best_count(self, side: int) -> int:
        """Return the valid n with D(n) = `side` whose R(n) is nearest to `side`, the later one on a tie."""
        candidates = [n for n in self.valid_counts if self.decode_size(n) == side]
        if not candidates:
            sides = sorted({self.decode_size(n) for n in self.valid_counts})
            raise DetailFlowError(
                f"no number of tokens is decoded at side {side}; the sides are {', '.join(map(str, sides))}"
            )
        return max(candidates, key=lambda n: (-abs(self.resolution(n) - side), n))

    def group_start(self, position: int) -> int:
        """Return the first of the tokens that are predicted together with the one at `position`."""
        return position if position < self.num_causal else position // self.group_size * self.group_size

    def span_end(self, position: int) -> int:
        """Return one past the last of the tokens that are predicted together with the one at `position`."""
        return position + 1 if position < self.num_causal else self.group_start(position) + self.group_size

    def check_span(self, position: int) -> int:
        """Return `span_end` of a valid `position` of wrong tokens: any below c, from c on the start of a group."""
        position = checked("position", position, int)
        if any(start == position for start, _ in self.steps):
            return self.span_end(position)
        single = f"below {self.num_causal} or " if self.num_causal else ""
        multiple = f"a multiple of {self.group_size} below {self.num_tokens}"
        raise DetailFlowError(f"position must be {single}{multiple}, not {position}")

    def attention_mask(self, n: int, device: torch.device | str | None = None) -> Tensor:
        """Return the (n, n) group mask, True if row i may attend to column j (Sec. 3.3; docs/method.md#groups).

        The encoder's queries and the AR model's positions share it.
        """
        i = torch.arange(self._number(n, 0), device=device)
        row, column = i[:, None], i[None, :]
        same_or_earlier_group = column // self.group_size <= row // self.group_size
        return torch.where(row < self.num_causal, column <= row, same_or_earlier_group)
