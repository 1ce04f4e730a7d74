"""Clips of one length, rate and size from video files as people have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av.error import FFmpegError
from PIL import Image, ImageOps
from torch import Tensor

from mirai_dist.config.error import FileError

_EARLY = 1e-3  # seconds: a frame that begins this much after a moment is still the one shown at it


@dataclass(frozen=True)
class ClipForm:
    """What every clip is brought to: frames at a rate, and a size in pixels."""

    frames: int
    fps: int
    height: int
    width: int

    @property
    def seconds(self) -> float:
        """From the first frame of a clip to its last."""
        return (self.frames - 1) / self.fps


def read_clip(path: Path, form: ClipForm) -> Tensor:
    """The beginning of a video as [frames, 3, height, width] float32 in [-1, 1].

    Frame k is the one that is shown k / fps after the first. Of a picture the largest centred part of the right aspect
    ratio is taken and resized (Lanczos). FileError, for the list of what was left out: it is no video, damaged where
    it is needed, too short, or to be shown turned.
    """
    clip = torch.empty(form.frames, form.height, form.width, 3, dtype=torch.uint8)
    filled = 0
    with _decoding(path):
        for shown_until, frame in _shown(path):
            picture = None
            while filled < form.frames and filled / form.fps < shown_until - _EARLY:
                picture = _fitted(frame, form) if picture is None else picture
                clip[filled] = picture
                filled += 1
            if filled == form.frames:
                return clip.movedim(-1, 1).float() / 127.5 - 1
    what = f"is too short: {filled} of {form.frames} frames at {form.fps} fps"
    raise FileError(path, f"{what}; {form.seconds:.2f} seconds are needed")


def _shown(path: Path) -> Iterator[tuple[float, av.VideoFrame]]:
    """Frames in order, each with the time, from the first frame on, until which it is shown."""
    with av.open(str(path.absolute())) as container:
        if not container.streams.video:
            raise FileError(path, "holds no video")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or 0)
        first, held, last, count = None, None, 0.0, 0
        for index, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise FileError(path, f"is damaged at frame {index}")
            if frame.rotation:
                raise FileError(path, f"is to be shown turned by {frame.rotation} degrees; write it upright")
            if frame.time is None:
                raise FileError(path, f"gives no time for frame {index}")
            first = frame.time if first is None else first
            if held is not None:
                yield frame.time - first, held
            held, last, count = frame, frame.time - first, index + 1
        if held is not None:
            yield last + (1 / rate if rate else 0.0), held
        if count < stream.frames:
            raise FileError(path, f"was cut short: {count} of its {stream.frames} frames can be decoded")


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """FileError for anything that FFmpeg or the disk objects to."""
    try:
        yield
    except (OSError, ValueError, FFmpegError) as error:
        reason = str(getattr(error, "strerror", None) or error or type(error).__name__)[:120]
        raise FileError(path, f"cannot be read as a video: {reason}") from error


def _fitted(frame: av.VideoFrame, form: ClipForm) -> Tensor:
    """[height, width, 3] uint8."""
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    if image.size != (form.width, form.height):
        image = ImageOps.fit(image, (form.width, form.height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image))
