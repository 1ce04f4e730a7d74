from __future__ import annotations

import io
import json
import shutil
import subprocess
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mirai_dist.config.error import FileError
from mirai_dist.evaluate import video_files
from mirai_dist.evaluate.video_files import (
    Mp4Writer,
    gif_bytes,
    grid,
    poster,
    read_image,
    read_metadata,
    read_mp4,
    to_uint8,
    vbench_name,
    write_gif,
    write_mp4,
)


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


# Piece by piece


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_pieces_make_the_file_that_the_whole_makes(tmp_path: Path) -> None:
    video = moving_square(frames=21)
    write_mp4(tmp_path / "whole.mp4", video, fps=16)
    with Mp4Writer(tmp_path / "pieces.mp4", fps=16) as writer:
        for piece in video.split([9, 1, 4, 7]):
            writer.append(piece)
            assert names(tmp_path) == ["pieces.mp4.new", "whole.mp4"]
        assert writer.frames == 21
    assert names(tmp_path) == ["pieces.mp4", "whole.mp4"]
    assert (tmp_path / "pieces.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, moving_square(), fps=16)
    before = path.read_bytes()
    for failure in (KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(failure), Mp4Writer(path, fps=16) as writer:
            writer.append(moving_square(size=64))
            raise failure
    with pytest.raises(ValueError, match="after frames of"), Mp4Writer(path, fps=16) as writer:
        writer.append(moving_square())
        writer.append(moving_square(size=64))
    with pytest.raises(ValueError, match="no frame was appended"), Mp4Writer(path, fps=16):
        pass
    assert names(tmp_path) == ["a.mp4"] and path.read_bytes() == before
    with pytest.raises(ValueError, match="context manager"):
        Mp4Writer(path, fps=16).append(moving_square())


def test_what_a_killed_writer_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.mp4.new").write_bytes(b"half" * 100_000)
    write_mp4(tmp_path / "a.mp4", moving_square(), fps=16)
    assert names(tmp_path) == ["a.mp4"] and len(read_mp4(tmp_path / "a.mp4")[0]) == 9


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "taken.mp4").mkdir()
    for path in (tmp_path / "file" / "a.mp4", tmp_path / "taken.mp4", tmp_path / f"{'x' * 254}.mp4"):
        with pytest.raises(FileError, match="cannot be written") as caught:
            write_mp4(path, moving_square(), fps=16)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert names(tmp_path) == ["file", "taken.mp4"]
    if Path("/dev/full").exists():
        (tmp_path / "full.mp4.new").symlink_to("/dev/full")
        with pytest.raises(FileError, match="No space left"):
            write_mp4(tmp_path / "full.mp4", moving_square(), fps=16)
        assert names(tmp_path) == ["file", "taken.mp4"]


def test_a_colon_in_a_relative_name_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path("pipe:1 %d a film in 3:2?-0.mp4")
    write_mp4(name, moving_square(), fps=16)
    assert names(tmp_path) == [str(name)] and len(read_mp4(name)[0]) == 9 and poster(name)[1:4] == b"PNG"


def test_an_encoder_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_files.av, "codecs_available", set())
    with pytest.raises(FileError, match="libx264"):
        write_mp4(tmp_path / "a.mp4", moving_square(), fps=16)
    assert names(tmp_path) == []


# Metadata, and reading


def test_metadata_comes_back(tmp_path: Path) -> None:
    given = {
        "title": "\u00c9in langer Text, \u732b; key=value\nsecond line " + "word " * 500,
        "comment": json.dumps({"seed": 3, "recipe": "0123abcd"}),
        "description": "d",
    }
    write_mp4(tmp_path / "a.mp4", moving_square(), fps=16, metadata=given)
    assert read_metadata(tmp_path / "a.mp4") == given
    write_mp4(tmp_path / "b.mp4", moving_square(), fps=16, metadata={"title": "a\0b\udc80c"})
    assert read_metadata(tmp_path / "b.mp4") == {"title": "a\ufffdb?c"}
    write_mp4(tmp_path / "c.mp4", moving_square(), fps=16)
    assert read_metadata(tmp_path / "c.mp4") == {}
    with pytest.raises(ValueError, match="keeps only title, comment, description"):
        Mp4Writer(tmp_path / "d.mp4", fps=16, metadata={"seed": "3"})


def test_read_mp4_gives_frames_and_rate(tmp_path: Path) -> None:
    video = moving_square(frames=81, size=16).repeat(1, 8, 10, 1)
    write_mp4(tmp_path / "a.mp4", video, fps=16)
    frames, rate = read_mp4(tmp_path / "a.mp4")
    assert frames.shape == video.shape and frames.dtype == torch.uint8 and rate == 16
    assert (frames.int() - video.int()).abs().float().mean() < 6


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="no ffprobe on this machine")
def test_ffprobe_accepts_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with Mp4Writer(path, fps=16, metadata={"title": "a red square", "comment": '{"seed": 3}'}) as writer:
        for _ in range(9):
            writer.append(moving_square())
    command = ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-show_format", "-of", "json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    probed = json.loads(done.stdout)
    [stream] = probed["streams"]
    assert (stream["codec_name"], stream["pix_fmt"], stream["r_frame_rate"]) == ("h264", "yuv420p", "16/1")
    assert (stream["width"], stream["height"], stream["nb_frames"]) == (128, 128, "81")
    assert stream["nb_read_frames"] == "81" and float(stream["duration"]) == pytest.approx(81 / 16)
    assert probed["format"]["tags"]["title"] == "a red square"
    assert json.loads(probed["format"]["tags"]["comment"]) == {"seed": 3}


def test_what_is_no_video_is_one_line(tmp_path: Path) -> None:
    write_mp4(tmp_path / "whole.mp4", moving_square(frames=33), fps=16)
    whole = (tmp_path / "whole.mp4").read_bytes()
    with av.open(str(tmp_path / "whole.mp4")) as container:
        places = sorted(packet.pos for packet in container.demux(video=0) if packet.pos is not None)
    contents = {"empty": b"", "text": b"hello " * 99, "head": whole[:200], "torn": whole[:-300]}
    contents["cut"] = whole[: places[20]]  # after a whole packet: FFmpeg itself sees nothing wrong
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with wave.open(str(tmp_path / "sound"), "wb") as sound:
        sound.setparams((1, 2, 8000, 100, "NONE", ""))
        sound.writeframes(bytes(200))
    for name in (*contents, "sound", "nowhere", "."):
        with pytest.raises(FileError) as caught:
            read_mp4(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    for read in (read_metadata, poster):
        with pytest.raises(FileError, match="as a video"):
            read(tmp_path / "text")
    assert "20 of 33 frames: it was cut short" in str(pytest.raises(FileError, read_mp4, tmp_path / "cut").value)


# Pictures


def save(path: Path, pixels: np.ndarray, mode: str = "RGB", **options: object) -> Path:
    Image.fromarray(pixels.astype(np.uint8), mode).save(path, **options)  # type: ignore[arg-type]
    return path


def test_read_image_crops_the_middle_and_resizes(tmp_path: Path) -> None:
    pixels = np.zeros((40, 100, 3))
    pixels[:, :, 1] = 255
    pixels[:, 30:70] = (255, 0, 51)  # the middle square
    image = read_image(save(tmp_path / "a.png", pixels), 16, 16)
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32
    # The outermost columns see a little of what is beside the square.
    assert torch.allclose(image[:, :, 3:-3], torch.tensor([1.0, -1.0, -0.6])[:, None, None].expand(3, 16, 10))
    high = read_image(save(tmp_path / "b.png", pixels.transpose(1, 0, 2)), 8, 24)
    assert high.shape == (3, 8, 24) and torch.allclose(high[:, 4], torch.tensor([1.0, -1.0, -0.6])[:, None])
    same = np.random.default_rng(0).integers(0, 256, (16, 24, 3))
    back = read_image(save(tmp_path / "c.png", same), 16, 24)
    assert torch.equal(to_uint8(back[None])[0], torch.from_numpy(same).to(torch.uint8))


def test_read_image_turns_photographs_and_shows_transparency_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3))
    pixels[:, :16] = 255  # left half white; turned clockwise by a quarter it is the upper half
    turned = Image.Exif()
    turned[0x0112] = 6
    image = read_image(save(tmp_path / "a.png", pixels, exif=turned), 32, 16)
    assert (image[:, :15] > 0.9).all() and (image[:, 17:] < -0.9).all()
    clear = np.zeros((8, 8, 4))
    clear[:, 4:] = (0, 0, 0, 255)
    image = read_image(save(tmp_path / "b.png", clear, "RGBA"), 8, 8)
    assert (image[:, :, :4] == 1).all() and (image[:, :, 4:] == -1).all()
    grey = save(tmp_path / "c.png", np.full((8, 8), 51), "L")
    assert torch.allclose(read_image(grey, 4, 4), torch.full((3, 4, 4), -0.6))


def test_what_is_no_picture_is_one_line(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 256, (32, 32, 3))).read_bytes()
    for name, content in {"empty": b"", "text": b"hello", "cut": whole[:900], "head": whole[:30]}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("empty", "text", "cut", "head", "nowhere", "."):
        with pytest.raises(FileError, match="cannot be read as a picture") as caught:
            read_image(tmp_path / name, 8, 8)
        assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(FileError, match="8 bits a channel"):
        read_image(tmp_path / "deep.png", 8, 8)


# Names


def test_vbench_names_are_exact_for_prompts_like_its_own() -> None:
    for prompt in ("A person is riding a bike", "50% \u00e9lan: 3:2, \"no\"?", " two  spaces ", "x" * 210, "y" * 245):
        assert vbench_name(prompt, 0) == f"{prompt}-0.mp4"
    assert vbench_name("A person is riding a bike", 12) == "A person is riding a bike-12.mp4"


def test_other_prompts_become_names_that_files_can_have(tmp_path: Path) -> None:
    prompts = [
        "x" * 246, "x" * 400, "x" * 399 + "y", "\u732b" * 100, "a" + "\u732b" * 100, "\U0001f600" * 64,
        "1/2", "1_2", "1\n2", "1\0" + "2", "1\u20282", "../../etc/passwd", "\udc80", "\udc81", "/" * 500,
    ]  # fmt: skip
    found = [vbench_name(prompt, 3) for prompt in prompts]
    assert len(set(found)) == len(found)
    for prompt, name in zip(prompts, found, strict=True):
        assert len(name.encode()) <= 251 and name.endswith("-3.mp4") and "\ufffd" not in name
        assert name == vbench_name(prompt, 3) != vbench_name(prompt, 4)
        (tmp_path / f"{name}.new").write_bytes(b"")
    assert len(names(tmp_path)) == len(prompts)
    assert vbench_name("1_2", 3) == "1_2-3.mp4"
    assert vbench_name("1/2", 3).startswith("1_2~") and len(vbench_name("1/2", 3)) == len("1_2~-3.mp4") + 16
    # A cut name is as long as it can be: one character more would not fit.
    assert len(vbench_name("x" * 400, 3)) == 251 and len(vbench_name("\u732b" * 100, 3).encode()) in (249, 250, 251)
