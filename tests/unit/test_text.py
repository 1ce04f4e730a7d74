"""The vocabulary encoder: fixed, order-visible, loud about what it does not know."""

from __future__ import annotations

import pytest
import torch

from mirai_dist.data.world import VOCABULARY
from mirai_dist.models.text import POSITION_SCALE, VocabularyEncoder

CAPTION = "a red circle moving left"
GOLDEN = [-0.445231, -0.166802, 0.054676]


def test_shape_padding_and_negative() -> None:
    encoder = VocabularyEncoder(VOCABULARY, dim=64, length=8)
    out = encoder.encode([CAPTION, "red", ""])
    assert out.shape == (3, 8, 64) and out.dtype == torch.float32
    used = out.abs().sum(-1) > 0
    assert used.sum(1).tolist() == [5, 1, 0]
    assert used[0, :5].all()
    assert torch.equal(encoder.negative(), torch.zeros(1, 8, 64))
    assert encoder.encode([]).shape == (0, 8, 64)


def test_words_do_not_depend_on_vocabulary_order_or_random_state() -> None:
    torch.manual_seed(1)
    first = VocabularyEncoder(VOCABULARY, 64, 8).encode([CAPTION])
    torch.manual_seed(2)
    second = VocabularyEncoder(("extra", *reversed(VOCABULARY)), 64, 8).encode([CAPTION])
    assert torch.equal(first, second)
    # A golden value: the embedding is part of every trained teacher, so it may never drift.
    assert first[0, 1, :3].tolist() == pytest.approx(GOLDEN, abs=1e-5)


def test_words_are_unit_variance_and_nearly_orthogonal() -> None:
    encoder = VocabularyEncoder(VOCABULARY, 256, 1)
    words = encoder.encode(list(VOCABULARY))[:, 0]
    words = words - encoder._positions[0]
    assert torch.allclose(words.square().mean(1), torch.ones(len(VOCABULARY)), atol=1e-5)
    products = words @ words.T / 256 - torch.eye(len(VOCABULARY))
    assert products.abs().max() < 0.3


def test_word_order_is_visible_but_small() -> None:
    encoder = VocabularyEncoder(VOCABULARY, 64, 8)
    ab, ba = encoder.encode(["red blue"])[0], encoder.encode(["blue red"])[0]
    moved = (ab[0] - ba[1]).square().mean().sqrt()
    assert 0.1 * POSITION_SCALE < moved < 2 * POSITION_SCALE
    positions = encoder.encode(["red red red red red red red red"])[0]
    apart = torch.cdist(positions, positions) + 100 * torch.eye(8)
    assert apart.min() > 0.3


def test_refusals_name_word_and_prompt() -> None:
    encoder = VocabularyEncoder(VOCABULARY, 16, 5)
    with pytest.raises(ValueError, match="'purple'.*'a purple circle'") as unknown:
        encoder.encode([CAPTION, "a purple circle"])
    assert "\n" not in str(unknown.value)
    with pytest.raises(ValueError, match="6 words but text.length is 5"):
        encoder.encode([CAPTION + " a"])
