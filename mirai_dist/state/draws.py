"""Keyed randomness: every draw is a pure function of what it is for, never of what was drawn before.

A draw is named by (seed, purpose, cycle, position, sample). Its bits come from a hash of that name, so all ranks
agree without talking, a resumed run draws what the uninterrupted one would have, and the world size does not
change which noise a sample gets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor


def keyed_bits(*key: int | str) -> int:
    """A 128-bit integer that depends on every part of `key`, equal on every machine and Python version."""
    # JSON keeps parts apart: ("a", 12) and ("a1", 2) must not meet, and 1 is not "1".
    text = json.dumps(key, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")


class Draws:
    """All random numbers of one run.

    `seed` is the run's training seed; `device` is where tensors are drawn. CPU and CUDA generators give different
    numbers for the same key, so a run keeps its device kind for its whole life.
    Python integers and floats are hashed directly: they cost no device synchronisation and are equal everywhere.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.device = device

    def generator(self, purpose: str, cycle: int, position: int, sample: int) -> torch.Generator:
        """A fresh generator on the device for one global sample; drawing from it changes no other draw."""
        return _seeded(self.device, self._bits("generator", purpose, cycle, position, sample))

    def normal(self, purpose: str, cycle: int, position: int, samples: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Standard normal noise [len(samples), *shape], fp32; row i depends on samples[i] alone, not on its company."""
        noise = torch.empty((len(samples), *shape), dtype=torch.float32, device=self.device)
        for row, sample in zip(noise, samples, strict=True):
            row.normal_(generator=self.generator(purpose, cycle, position, sample))
        return noise

    def integer(self, purpose: str, cycle: int, position: int, sample: int, high: int) -> int:
        """A uniform integer in [0, high). Raises ValueError for high < 1."""
        if high < 1:
            raise ValueError(f"draw {purpose!r}: high is {high}, must be at least 1")
        # 128 bits against a small `high`: the bias of the remainder is below 2^-64.
        return self._bits("integer", purpose, cycle, position, sample) % high

    def uniform(self, purpose: str, cycle: int, position: int, sample: int) -> float:
        """A uniform float in [0, 1) with 53 random bits."""
        return (self._bits("uniform", purpose, cycle, position, sample) >> 75) / 2**53

    def for_parameter(self, name: str) -> torch.Generator:
        """A CPU generator for the initial values of one parameter, by its full name.

        Keyed by name rather than drawn in order, so that a sharded and an unsharded build, or two networks that
        share some layers, start from the same values.
        """
        return _seeded(torch.device("cpu"), self._bits("parameter", name))

    def _bits(self, kind: str, purpose: str, cycle: int = 0, position: int = 0, sample: int = 0) -> int:
        return keyed_bits(self.seed, kind, purpose, cycle, position, sample)


def _seeded(device: torch.device, bits: int) -> torch.Generator:
    # CUDA keeps all 63 bits of a seed; torch's CPU generator keeps the low 32, which is why the bits are hashed:
    # with 10,000 draws of a CPU run, the chance that any two share their noise is about one in a hundred.
    return torch.Generator(device=device).manual_seed(bits & (2**63 - 1))
