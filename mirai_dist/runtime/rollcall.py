"""The ranks of a job by way of their store: it works before the first collective, and where collectives do not.

Rank 0 waits for each answer with a deadline, so that a rank which does not give it is known by name. Everything goes
through rank 0 once: what n ranks say costs n small messages.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_POLL = 0.05  # seconds
_MARGIN = 30.0  # seconds that the others wait longer than rank 0 may take


class RollCall:
    """One rank's end. store: of the job, under a name of its own. Topics are used once each."""

    def __init__(self, store: dist.Store, rank: int, ranks: int) -> None:
        self._store, self.rank, self.ranks = store, rank, ranks

    def tell(self, topic: str, value: object) -> None:
        """Hand in this rank's answer, which must be JSON."""
        self._store.set(f"{topic}/{self.rank}", json.dumps(value))

    def heard(self, topic: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """On rank 0: the answers of these ranks that came within `seconds`."""
        keys = {rank: f"{topic}/{rank}" for rank in ranks}
        deadline = time.monotonic() + seconds
        while not self._store.check(list(keys.values())) and time.monotonic() < deadline:
            time.sleep(_POLL)
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def decide(self, topic: str, make: Callable[[], Any], seconds: float) -> Any:
        """What rank 0 makes, on every rank. seconds: how long rank 0 may take before the others give up."""
        if self.rank == 0:
            made = make()
            self._store.set(topic, json.dumps(made))
            return made
        self._store.wait([topic], timedelta(seconds=seconds + _MARGIN))
        return json.loads(self._store.get(topic))
