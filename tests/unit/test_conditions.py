"""Conditions that are a choice of others: which entry is embedded, and what the negative prompt is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirai_dist.data.conditions import Encoded, Selected


@dataclass(frozen=True)
class Words:
    size: int = 9

    def captions(self, numbers: Sequence[int]) -> list[str]:
        return [f"caption {number}" for number in numbers]


class Digits:
    """Embeds a caption as its number."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([[[float(prompt.split()[1])]] for prompt in prompts])

    def negative(self) -> Tensor:
        return torch.full((1, 1, 1), -1.0)


def test_entries_are_those_of_the_source_in_their_own_order() -> None:
    selected = Selected(Encoded(Words(), Digits()), [7, 2, 2, 5])
    assert selected.size == 4
    assert selected.captions([0, 3, 1]) == ["caption 7", "caption 5", "caption 2"]
    assert selected.embed([3, 2]).flatten().tolist() == [5.0, 2.0]
    assert selected.negative().item() == -1.0
