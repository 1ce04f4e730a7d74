"""A section's desk: it times cases until the deadline, and writes each as one line of JSON at once."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PREDICTIONS = Path(__file__).with_name("predictions.json")
NO_CUDA = "needs a CUDA device"
# FlashAttention-2 as torch ships it, and torch's own choice on Hopper
ALIASES: dict[str, str] = dict.fromkeys(("sdpa", "sdpa-flash", "flash"), "flash-2")


class Work(NamedTuple):
    """So many operations, or bytes where the kind is memory, at the rate of a kind."""

    kind: str
    amount: float


@dataclass(frozen=True)
class Case:
    """name: what is computed. variant: by whom. work: what it takes, for the prediction; none: nothing is predicted."""

    name: str
    variant: str
    shape: str
    work: tuple[Work, ...] = ()


class Desk:
    """Where a section measures. rehearsal: small shapes on whatever device there is, to see that all of it runs."""

    def __init__(self, section: str, out: Path, seconds: float, rehearsal: bool) -> None:
        self.section, self.out, self.rehearsal = section, out, rehearsal
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.dtype = torch.bfloat16
        self._rows = (out / f"{section}.jsonl").open("a")
        self._ends = time.monotonic() + seconds
        self._rates = rates(torch.cuda.get_device_name()) if self.cuda else {}

    def drawn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers: zeros are multiplied faster."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    @property
    def left(self) -> float:
        """Seconds until the section's deadline."""
        return self._ends - time.monotonic()

    def time(self, case: Case, function: Callable[[], Any], **found: Any) -> float | None:
        """Milliseconds, the median of each of two runs; written as a row, with what else was found. None where it did
        not run."""
        if self.left < 0:
            self.skip(case, "the section's deadline was over")
            return None
        try:
            function()
            first, second = (self._median(function) for _ in range(2))
        except Exception as error:  # noqa: BLE001  whatever a kernel dies of is this row's result
            self.skip(case, f"fails with {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}")
            return None
        predicted, sources = self._predicted(case.work)
        self.write(case, ms=first, ms_again=second, predicted_ms=predicted, predicted_from=sources, **found)
        return min(first, second)

    def skip(self, case: Case, reason: str) -> None:
        self.write(case, skipped=reason)

    def write(self, case: Case, **found: Any) -> None:
        work = {each.kind: each.amount for each in case.work}
        row = {"section": self.section, "case": case.name, "variant": case.variant, "shape": case.shape, "work": work}
        self._rows.write(json.dumps(row | {"dtype": str(self.dtype).removeprefix("torch.")} | found) + "\n")
        self._rows.flush()

    def predicted_ms(self, work: Sequence[Work]) -> float | None:
        return self._predicted(tuple(work))[0]

    def _predicted(self, work: tuple[Work, ...]) -> tuple[float | None, list[str]]:
        """Milliseconds, None where a rate is unknown, and where the rates are from."""
        found = [self._rates.get(_rate_name(each.kind)) for each in work]
        if not found or None in found:
            return None, []
        known = [each for each in found if each is not None]
        seconds = sum(each.amount / rate for each, (rate, _) in zip(work, known, strict=True))
        return 1e3 * seconds, sorted({source for _, source in known})

    def _median(self, function: Callable[[], Any]) -> float:
        if self.cuda:
            from triton.testing import do_bench  # clears the L2 cache between runs

            milliseconds = do_bench(function, warmup=25, rep=100, return_mode="median")
            assert isinstance(milliseconds, float)  # a list only of return_mode "all"
            return milliseconds
        seconds = []
        for _ in range(1 if self.rehearsal else 3):
            began = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - began)
        return 1e3 * statistics.median(seconds)


def _rate_name(kind: str) -> str:
    words = kind.split()
    return " ".join(ALIASES.get(word, word) for word in words)


def rates(device: str) -> dict[str, tuple[float, str]]:
    """Rate and its source by kind of work, for the GPU whose name holds one of the file's; empty: none does."""
    gpus = json.loads(PREDICTIONS.read_text())["gpus"]
    name = next((name for name in gpus if name in device), None)
    if name is None:
        return {}
    own = dict(gpus[name])
    base = own.pop("same as", None)
    return {kind: tuple(each) for kind, each in ((gpus[base] if base else {}) | own).items()}
