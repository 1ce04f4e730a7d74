"""Videos as files and bytes: H.264 for people, GIF for TensorBoard, PNG for posters, grids for comparison."""

from __future__ import annotations

import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

_VISIBLE = 128  # pixels: smaller pictures are enlarged to about this by whole factors


def to_uint8(video: Tensor) -> Tensor:
    """[..., T, 3, H, W] float in [-1, 1] -> [..., T, H, W, 3] uint8; values outside are clamped."""
    if not video.isfinite().all():
        raise ValueError("to_uint8: the video holds non-finite values")
    levels = ((video.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.movedim(-3, -1)


def grid(videos: Tensor, columns: int, border: int = 2) -> Tensor:
    """[N, T, 3, H, W] in [-1, 1] -> [T, rows H', columns W', 3] uint8, row by row, with `border` grey pixels.

    The border surrounds each cell; cells that N does not fill stay grey.
    """
    cells = to_uint8(videos)
    count, frames, height, width, _ = cells.shape
    rows = -(-count // columns)
    high, wide = height + border, width + border
    canvas = torch.full((frames, rows * high + border, columns * wide + border, 3), 128, dtype=torch.uint8)
    for index in range(count):
        top, left = border + index // columns * high, border + index % columns * wide
        canvas[:, top : top + height, left : left + width] = cells[index]
    return canvas


def write_mp4(path: Path, frames: Tensor, fps: int, scale: int | None = None) -> None:
    """Write [T, H, W, 3] uint8 as H.264 (yuv420p, crf 12), enlarged by the whole factor `scale`.

    scale None enlarges pictures below 128 pixels to about that size: 32 x 32 becomes 128 x 128. The file is
    written beside and renamed. ValueError for another shape or type, or an odd size (yuv420p halves it).
    """
    picture = _enlarged(_checked(frames), scale)
    height, width = picture.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"write_mp4: {height} x {width} after enlarging by {scale}; H.264 needs even sizes")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    with av.open(str(beside), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "12", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in picture:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    os.replace(beside, path)


def gif_bytes(frames: Tensor, fps: int, scale: int | None = None) -> bytes:
    """[T, H, W, 3] uint8 as an endless animated GIF; frame times are rounded to GIF's hundredths of a second."""
    images = [Image.fromarray(image) for image in _enlarged(_checked(frames), scale)]
    buffer = io.BytesIO()
    milliseconds = round(100 / fps) * 10
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    return buffer.getvalue()


def write_gif(path: Path, frames: Tensor, fps: int, scale: int | None = None) -> None:
    """Write [T, H, W, 3] uint8 as an animated GIF."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gif_bytes(frames, fps, scale))


def poster(path: Path) -> bytes:
    """The first frame of a video file as PNG, shown until the video plays."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    buffer = io.BytesIO()
    frame.to_image().save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _checked(frames: Tensor) -> np.ndarray:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.shape[0] == 0:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {tuple(frames.shape)}")
    return frames.cpu().numpy()


def _enlarged(frames: np.ndarray, scale: int | None) -> np.ndarray:
    factor = max(1, round(_VISIBLE / min(frames.shape[1:3]))) if scale is None else scale
    return np.ascontiguousarray(frames.repeat(factor, axis=1).repeat(factor, axis=2))
