"""Where records go: JSON lines and TensorBoard on rank 0, nowhere on the others."""

# Protocol-buffer modules build their names at import; a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
import math
import os
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

# What a record is about rather than what was measured: kept out of TensorBoard's scalars.
KEYS = ("stage", "cycle", "position", "phase", "time")


class Sink:
    """One destination. A record holds KEYS and named floats; what a destination cannot hold it leaves out."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Store one record: {"stage", "cycle", "position", "phase", "time", "<name>": float ...}."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Store a Markdown text."""

    def video(self, tag: str, gif: bytes, step: int) -> None:
        """Store a video, given as an encoded GIF (mirai_dist.evaluate.video_files.gif_bytes)."""

    def truncate_to(self, cycle: int, position: int) -> None:
        """Forget what was recorded at or after (cycle, position), the point where a resumed run goes on."""

    def close(self) -> None:
        """Write out what is held back and release the files."""


class JsonLines(Sink):
    """One JSON object a line, flushed at each record, so that a killed run loses at most a torn last line.

    JSON has no word for non-finite numbers; they are written as the strings "nan", "inf" and "-inf", which
    float() reads back.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._rewrite(_complete_lines(self.path))
        self._file = self.path.open("a", encoding="utf-8")

    def record(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({key: _strict(value) for key, value in record.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def truncate_to(self, cycle: int, position: int) -> None:
        self._file.close()
        kept = []
        for number, line in enumerate(_complete_lines(self.path), start=1):
            try:
                record = json.loads(line)
                point = (int(record["cycle"]), int(record["position"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}:{number} is not a record with cycle and position ({error}); repair or move the file"
                ) from error
            if point < (cycle, position):
                kept.append(line)
        self._rewrite(kept)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    def _rewrite(self, lines: Sequence[str]) -> None:
        """Replace the file as a whole: a kill in the middle leaves the old one."""
        beside = self.path.with_name(self.path.name + ".new")
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)


def _complete_lines(path: Path) -> list[str]:
    """Lines that end in a newline; what follows the last one was torn by a kill."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _strict(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard(Sink):
    """Scalars by cycle, texts, and videos as animated images.

    A cycle has several records (one a position); their values are averaged, so that each tag has one point a
    cycle. Event protocol buffers are written directly: torch's SummaryWriter.add_video needs moviepy and,
    without it, stores nothing and says nothing.
    """

    def __init__(self, directory: Path) -> None:
        self._writer = EventFileWriter(str(directory), flush_secs=10)
        self._cycle = -1
        self._values: dict[str, list[float]] = {}

    def record(self, record: Mapping[str, Any]) -> None:
        cycle = int(record["cycle"])
        if cycle != self._cycle:
            self._flush_cycle()
            self._cycle = cycle
        for name, value in record.items():
            if name not in KEYS and isinstance(value, int | float):
                self._values.setdefault(name, []).append(float(value))

    def text(self, tag: str, text: str, step: int) -> None:
        tensor = TensorProto(
            dtype=DT_STRING,
            string_val=[text.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._summary(Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor), step=step)

    def video(self, tag: str, gif: bytes, step: int) -> None:
        if gif[:3] != b"GIF":
            raise ValueError(f"video {tag}: not an encoded GIF")
        width, height = struct.unpack("<HH", gif[6:10])
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        self._summary(Summary.Value(tag=tag, image=image), step=step)
        self._writer.flush()

    def truncate_to(self, cycle: int, position: int) -> None:
        """TensorBoard drops the points of earlier files whose step is not below that of a START event."""
        self._values, self._cycle = {}, -1
        self._writer.add_event(
            Event(wall_time=time.time(), step=cycle, session_log=SessionLog(status=SessionLog.START))
        )
        self._writer.flush()

    def close(self) -> None:
        self._flush_cycle()
        self._writer.close()

    def _flush_cycle(self) -> None:
        values = [Summary.Value(tag=name, simple_value=sum(seen) / len(seen)) for name, seen in self._values.items()]
        if values:
            self._summary(*values, step=self._cycle)
        self._values = {}

    def _summary(self, *values: Summary.Value, step: int) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))


class Sinks(Sink):
    """Every destination of a stage as one; an empty one takes everything and keeps nothing."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    @classmethod
    def of_stage(cls, rank: int, directory: Path) -> Sinks:
        """directory/metrics.jsonl and directory/tensorboard/ on rank 0, nothing on other ranks."""
        if rank != 0:
            return cls([])
        return cls([JsonLines(directory / "metrics.jsonl"), TensorBoard(directory / "tensorboard")])

    def record(self, record: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.record(record)

    def text(self, tag: str, text: str, step: int) -> None:
        for sink in self._sinks:
            sink.text(tag, text, step)

    def video(self, tag: str, gif: bytes, step: int) -> None:
        for sink in self._sinks:
            sink.video(tag, gif, step)

    def truncate_to(self, cycle: int, position: int) -> None:
        for sink in self._sinks:
            sink.truncate_to(cycle, position)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
