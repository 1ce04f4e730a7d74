"""Every operator of the kernels as a certificate calls it: the comparison itself works, on shapes of an interpreter."""

from __future__ import annotations

import pytest
import torch

from mirai_dist.certify import subjects
from mirai_dist.certify.compare import FAILED, PASSED, judged
from mirai_dist.certify.shapes import BySegment, Dense, Fusion, Head, Shapes, Tokens

SHAPES = Shapes(
    "float32",
    (Dense(1, 5, 11, heads=2, head_dim=16, past=6), Dense(1, 5, 12, heads=2, head_dim=16, past=7, sink=3)),
    (BySegment(1, 8, 4, heads=2, head_dim=16, doubled=True), BySegment(2, 6, 3, heads=2, head_dim=16, doubled=False)),
    (Tokens(2, 32, 2, (2, 2, 3), copies=1, vectors=2, first_frame=5),),
    (Head(7, 32, 48),),
    (Fusion(2, 3, 4, 48, (0, 1)),),
)


def test_every_operator_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "_unloaded", lambda device: "")
    monkeypatch.setattr(subjects, "LIBRARIES", ("triton", "cpu"))
    cpu = torch.device("cpu")
    rows = [row for subject in subjects.subjects(SHAPES, cpu) for row in judged(subject, torch.float32, cpu)]
    ours = [row for row in rows if row["op"] not in (subjects.ATTENTION, subjects.SEGMENTS)]
    assert {row["op"].split(":")[0] for row in ours} == {
        subjects.TOKENS,
        subjects.CHUNK,
        subjects.PREFIX,
        subjects.CACHE,
        subjects.COSINE,
        subjects.FUSION,
    }
    for row in ours:
        assert row["state"] == PASSED and row["same_twice"], row


def test_a_sink_and_a_ring_are_two_runs_of_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as one run there is NaN between them."""
    monkeypatch.setattr(subjects, "_unloaded", lambda device: "")
    monkeypatch.setattr(subjects, "LIBRARIES", ("triton",))
    monkeypatch.setattr(subjects, "_ends", lambda parts, unused: (0, sum(parts) + (len(parts) - 1) * unused))
    found = [each for each in subjects.subjects(SHAPES, torch.device("cpu")) if each.op == subjects.CHUNK]
    states = {each.shape: judged(each, torch.float32, torch.device("cpu"))[0]["state"] for each in found}
    assert states == {str(SHAPES.dense[0]): PASSED, str(SHAPES.dense[1]): FAILED}
