"""Videos as files and bytes: H.264 for people and VBench, GIF for TensorBoard, PNG for posters, grids to compare."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import av
import numpy as np
import torch
from av.error import FFmpegError
from PIL import Image, ImageOps
from torch import Tensor

from mirai_dist.config.error import FileError
from mirai_dist.state.commit import flush

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.video.stream import VideoStream

BESIDE = ".new"  # a file is written as NAME.new and renamed when it is whole
TAGS = ("title", "comment", "description")  # what an mp4 keeps of the metadata; others would be dropped unheard
_VISIBLE = 128  # pixels: smaller pictures are enlarged to about this by whole factors
_LONGEST_NAME = 255 - len(BESIDE)  # bytes; file systems end at 255


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


class Mp4Writer:
    """An H.264 file (yuv420p, crf 12) that frames are appended to as they are generated.

    A context manager: the file is written as NAME.new and renamed when the block ends, so a NAME that exists is
    whole; when the block fails, or nothing was appended (ValueError), NAME.new is removed and an older NAME stays.

    scale None enlarges pictures below 128 pixels by a whole factor to about that size: 32 x 32 becomes 128 x 128.
    metadata: texts of the container by name, one of TAGS: title (the prompt), comment (JSON of seed and recipe);
    `read_metadata` gives them back. A NUL, which ends a text there, is written as U+FFFD; ValueError for another name.
    FileError if the file cannot be written.
    """

    def __init__(
        self, path: Path, fps: int, scale: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        unknown = sorted(set(metadata or {}) - set(TAGS))
        if unknown:
            raise ValueError(f"mp4 metadata {', '.join(unknown)}: an mp4 keeps only {', '.join(TAGS)}")
        # Absolute, because FFmpeg takes what stands before a colon in a relative name for a protocol.
        self._path = Path(path).absolute()
        self._beside = self._path.with_name(self._path.name + BESIDE)
        self._fps, self._scale = fps, scale
        self._metadata = {name: _storable(text) for name, text in (metadata or {}).items()}
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None
        self._shape: tuple[int, ...] = ()
        self.frames = 0

    def __enter__(self) -> Mp4Writer:
        with self._writing():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._beside.write_bytes(b"")  # FFmpeg opens it at the first packet only, many frames later
            self._container = av.open(str(self._beside), "w", format="mp4", options={"movflags": "faststart"})
        self._container.metadata.update(self._metadata)
        return self

    def append(self, frames: Tensor) -> None:
        """Add [t, H, W, 3] uint8, t >= 1. ValueError for another shape or type than that or the first piece's, or
        an odd size (yuv420p halves it)."""
        given = _checked(frames)
        if self._shape and given.shape[1:] != self._shape:
            raise ValueError(f"{self._path.name}: frames of {given.shape[1:]} after frames of {self._shape}")
        picture = _enlarged(given, self._scale)
        with self._writing():
            stream = self._stream or self._begin(*picture.shape[1:3])
            assert self._container is not None
            for image in picture:
                self._container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        self._shape = given.shape[1:]
        self.frames += len(given)

    def _begin(self, height: int, width: int) -> VideoStream:
        if height % 2 or width % 2:
            raise ValueError(f"{self._path.name}: {height} x {width} pixels as written; H.264 needs even sizes")
        if self._container is None:
            raise ValueError(f"{self._path.name}: an Mp4Writer is a context manager; append inside its block")
        if "libx264" not in av.codecs_available:
            raise FileError(self._path, "this PyAV has no libx264 encoder; install the wheel of the package `av`")
        rate, options = Fraction(self._fps), {"crf": "12", "preset": "medium"}
        self._stream = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        return self._stream

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        container, self._container = self._container, None
        assert container is not None
        try:
            if kind is None:
                self._finish(container)
        finally:
            with suppress(OSError, FFmpegError):  # what failed first is what counts
                container.close()
            with suppress(OSError):
                self._beside.unlink(missing_ok=True)

    def _finish(self, container: OutputContainer) -> None:
        if self._stream is None:
            raise ValueError(f"{self._path.name}: no frame was appended")
        with self._writing():
            container.mux(self._stream.encode(None))
            container.close()
            flush(self._beside)
            os.replace(self._beside, self._path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, FFmpegError) as error:
            raise FileError(self._path, f"cannot be written: {_reason(error)}") from error


def write_mp4(
    path: Path, frames: Tensor, fps: int, scale: int | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write [T, H, W, 3] uint8 as `Mp4Writer` does, whole."""
    _checked(frames)
    with Mp4Writer(path, fps, scale, metadata) as writer:
        writer.append(frames)


def read_mp4(path: Path) -> tuple[Tensor, float]:
    """([T, H, W, 3] uint8, frames a second) of a video file. FileError if it is none, or damaged, or cut short."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        if not stream.average_rate:
            raise FileError(path, "its video stream has no frame rate")
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        if not frames or len(frames) < stream.frames:
            raise FileError(path, f"holds {len(frames)} of {stream.frames} frames: it was cut short; make it again")
        return torch.from_numpy(np.stack(frames)), float(stream.average_rate)


def read_metadata(path: Path) -> dict[str, str]:
    """The container's texts named in TAGS, as they were given to `Mp4Writer`. FileError if it is no video file."""
    with _opened(path) as container:
        return {name: text for name, text in container.metadata.items() if name in TAGS}


def read_image(path: Path, height: int, width: int) -> Tensor:
    """A picture as [3, height, width] float32 in [-1, 1]: the largest centred part of that aspect ratio, resized
    (Lanczos). A photograph is turned as its camera noted; what is transparent is shown over white.

    FileError if the file is no picture, damaged, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise FileError(path, f"has more than 8 bits a channel (mode {file.mode}); convert it to 8-bit RGB")
            image = ImageOps.exif_transpose(file)
            if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise FileError(path, f"cannot be read as a picture: {_reason(error)}") from error
    levels = torch.from_numpy(np.array(fitted))
    return levels.movedim(-1, 0).float() / 127.5 - 1


def vbench_name(prompt: str, index: int) -> str:
    """The file name under which VBench looks for video number `index` of a prompt: `{prompt}-{index}.mp4`.

    VBench's own prompts (longest: 210 bytes) come through as they are. Two things cannot: a name of more than 251
    bytes (255 less what `Mp4Writer` adds while it writes) is cut between two characters, and a slash, a control
    character (NUL, newline) or a line separator becomes "_". A name so changed ends in `~` and 16 hexadecimal digits
    of the prompt's SHA-256 before `-{index}.mp4`, so prompts that begin alike do not meet in one file.
    """
    ending = f"-{index}.mp4"
    plain = _storable(re.sub(r"[/\x00-\x1f\x7f-\x9f\u2028\u2029]", "_", prompt))
    if plain == prompt and len((plain + ending).encode()) <= _LONGEST_NAME:
        return plain + ending
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    ending = f"~{digest}{ending}"
    return plain.encode()[: _LONGEST_NAME - len(ending)].decode(errors="ignore") + ending


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
    with _opened(path) as container:
        frame = next(container.decode(video=0), None)
        if frame is None:
            raise FileError(path, "holds no frame")
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


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    """A video file with at least one video stream. FileError for anything that FFmpeg objects to, also later."""
    try:
        with av.open(str(Path(path).absolute())) as container:
            if not container.streams.video:
                raise FileError(path, "holds no video")
            yield container
    except (OSError, ValueError, FFmpegError) as error:
        raise FileError(path, f"cannot be read as a video: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What the error says, without the path that the line already names."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)[:120]


def _storable(text: str) -> str:
    """The text without what UTF-8 or a C string cannot hold."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()

