from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mirai_dist.evaluate.video_files import gif_bytes, grid, poster, to_uint8, write_gif, write_mp4


def moving_square(frames: int = 9, size: int = 32) -> torch.Tensor:
    """[T, H, W, 3] uint8: a red square that moves right on blue."""
    video = torch.zeros(frames, size, size, 3, dtype=torch.uint8)
    video[..., 2] = 200
    for t in range(frames):
        video[t, 8:16, t : t + 8] = torch.tensor([220, 30, 30], dtype=torch.uint8)
    return video


def decoded(path: Path) -> tuple[np.ndarray, float, str]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate is not None
        return np.stack(frames), float(stream.average_rate), f"{stream.codec_context.name} {stream.pix_fmt}"


def test_to_uint8_maps_the_range_and_moves_channels_last() -> None:
    video = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).reshape(5, 1, 1, 1).expand(5, 3, 2, 4)
    levels = to_uint8(video)
    assert levels.shape == (5, 2, 4, 3) and levels.dtype == torch.uint8
    assert levels[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(ValueError, match="non-finite"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))


def test_mp4_comes_back_as_it_went_in(tmp_path: Path) -> None:
    video = moving_square()
    path = tmp_path / "deep" / "a.mp4"
    write_mp4(path, video, fps=16)
    frames, rate, kind = decoded(path)
    assert frames.shape == (9, 128, 128, 3) and rate == 16 and kind == "h264 yuv420p"
    shrunk = frames[:, 2::4, 2::4].astype(int)
    assert np.abs(shrunk - video.numpy().astype(int)).mean() < 4
    assert [item.name for item in path.parent.iterdir()] == ["a.mp4"]


def test_mp4_scale_and_refusals(tmp_path: Path) -> None:
    write_mp4(tmp_path / "b.mp4", moving_square(), fps=8, scale=2)
    assert decoded(tmp_path / "b.mp4")[0].shape[1:3] == (64, 64)
    with pytest.raises(ValueError, match="even"):
        write_mp4(tmp_path / "c.mp4", torch.zeros(2, 33, 32, 3, dtype=torch.uint8), fps=8, scale=1)
    with pytest.raises(ValueError, match="uint8"):
        write_mp4(tmp_path / "d.mp4", torch.zeros(2, 3, 32, 32), fps=8)


def test_gif_is_animated_and_endless(tmp_path: Path) -> None:
    write_gif(tmp_path / "a.gif", moving_square(), fps=10)
    image = Image.open(tmp_path / "a.gif")
    assert image.n_frames == 9 and image.size == (128, 128)  # type: ignore[attr-defined]
    assert image.info["loop"] == 0 and image.info["duration"] == 100
    first = np.asarray(image.convert("RGB")).astype(int)[2::4, 2::4]
    assert np.abs(first - moving_square()[0].numpy()).mean() < 2
    assert gif_bytes(moving_square(), fps=10)[:3] == b"GIF"


def test_poster_is_the_first_frame(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", moving_square(), fps=16)
    image = np.asarray(Image.open(io.BytesIO(poster(tmp_path / "a.mp4"))).convert("RGB")).astype(int)
    assert np.abs(image[2::4, 2::4] - moving_square()[0].numpy()).mean() < 4


def test_grid_places_cells_row_by_row() -> None:
    videos = torch.linspace(-1, 1, 3).reshape(3, 1, 1, 1, 1).expand(3, 2, 3, 4, 6)
    picture = grid(videos, columns=2, border=1)
    assert picture.shape == (2, 2 * 5 + 1, 2 * 7 + 1, 3)
    assert [picture[0, y, x, 0].item() for y, x in ((1, 1), (1, 8), (6, 1), (6, 8))] == [0, 128, 255, 128]
    assert (picture[:, 0] == 128).all() and (picture[:, :, 7] == 128).all()
