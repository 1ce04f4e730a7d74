"""Rotary positions: the published axis split and angles, absolute frame offsets, and their end at 1,024 frames."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirai_dist.models.wan import History
from mirai_dist.models.wan.rope import axis_widths, rotary_table, rotate
from tests.tiny_wan import latents, prompts, wan

CPU = torch.device("cpu")


def table(
    grid: tuple[int, int, int], first: int = 0, head_dim: int = 20, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    return rotary_table(grid, first, head_dim, CPU, dtype)


def vectors(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("head_dim", "widths"), [(128, (44, 42, 42)), (20, (8, 6, 6)), (32, (12, 10, 10))])
def test_axis_widths(head_dim: int, widths: tuple[int, int, int]) -> None:
    assert axis_widths(head_dim) == widths


def test_rotation_against_complex_multiplication() -> None:
    """The official form: 64 complex factors a position, time first, then height, then width."""
    frames, rows, columns, first = 2, 3, 4, 7
    position = torch.cartesian_prod(torch.arange(first, first + frames), torch.arange(rows), torch.arange(columns))
    angles = []
    for axis, width in enumerate((44, 42, 42)):
        exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
        angles.append(position[:, axis, None] * 10000.0**-exponent)
    factors = torch.polar(torch.ones(len(position), 64, dtype=torch.float64), torch.cat(angles, 1))
    x = vectors(2, len(position), 3, 128)
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (64, 2))) * factors[:, None]).flatten(-2)
    rotated = rotate(x, table((frames, rows, columns), first, 128))
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    frames=st.integers(1, 6),
    first=st.integers(0, 1000),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    data=st.data(),
)
def test_a_segment_is_rotated_as_its_frames_in_the_whole_video(
    frames: int, first: int, rows: int, columns: int, data: st.DataObject
) -> None:
    skip = data.draw(st.integers(0, frames - 1))
    per_frame = rows * columns
    whole = table((frames, rows, columns), first)
    part = table((frames - skip, rows, columns), first + skip)
    assert torch.equal(whole[0][skip * per_frame :], part[0]) and torch.equal(whole[1][skip * per_frame :], part[1])


def test_scores_depend_on_distance_alone() -> None:
    q, k = vectors(1, 1, 1, 20), vectors(1, 1, 1, 20).flip(-1)

    def score(query_frame: int, key_frame: int) -> float:
        return (rotate(q, table((1, 1, 1), query_frame)) * rotate(k, table((1, 1, 1), key_frame))).sum().item()

    assert score(5, 3) == pytest.approx(score(905, 903), abs=1e-10)
    assert abs(score(5, 3) - score(5, 4)) > 1e-3
    assert rotate(q, table((1, 1, 1), 900)).norm() == pytest.approx(q.norm().item(), abs=1e-12)


def test_fp32_keeps_late_frames_exact_and_dtypes_survive() -> None:
    x = vectors(1, 4, 2, 20)
    exact = rotate(x, table((1, 2, 2), 1023))
    narrow = rotate(x.float(), table((1, 2, 2), 1023, dtype=torch.float32))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), exact, rtol=0, atol=2e-6)
    assert rotate(x.bfloat16(), table((1, 2, 2), 0, dtype=torch.float32)).dtype == torch.bfloat16


def test_positions_end_at_1024_frames() -> None:
    table((24, 1, 1), 1000)
    with pytest.raises(ValueError, match="frame 1024 is past Wan's 1024 rotary positions") as caught:
        table((25, 1, 1), 1000)
    assert len(str(caught.value).splitlines()) == 1


@torch.no_grad()
def test_a_segment_past_the_last_position_is_refused_by_the_network() -> None:
    network, video, text, at = wan(), latents(1, 1, 2), prompts(2, 1), torch.zeros(1)
    network(video, at, text, history=History(first_frame=1022))
    with pytest.raises(ValueError, match="generate a shorter video"):
        network(video, at, text, history=History(first_frame=1023))
