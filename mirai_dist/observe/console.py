"""The one place in mirai_dist that prints.

Rank 0 on a terminal shows a progress bar; rank 0 elsewhere writes plain lines; every rank, rank 0 included,
keeps its own log file. Nothing here is collective.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import rich.console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 5.0
LARGEST = 16 << 20  # bytes of a rank's log; the file and the one before it are kept
_PACE_CYCLES = 20  # the pace shown is the mean over this many last cycles


class Console:
    """Says things to the user.

    log_path: this rank's log, RUN/logs/rank-N.log; it gets all lines with the time of day, rank 0's too.
    stream: where rank 0 speaks (standard output unless a test says otherwise). clock: monotonic seconds.
    """

    def __init__(
        self,
        rank: int,
        host: str,
        log_path: Path,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prefix = f"{host}:{rank}"
        self._clock = clock
        log_path = Path(log_path)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._path = log_path
        self._log = log_path.open("a", encoding="utf-8")
        self._lock = threading.RLock()  # the watchdog speaks from its own thread
        self._stream = (stream or sys.stdout) if rank == 0 else None
        self._rich = self._terminal()
        self._progress: Progress | None = None

    def _terminal(self) -> rich.console.Console | None:
        if self._stream is None:
            return None
        console = rich.console.Console(file=self._stream, highlight=False)
        return console if console.is_terminal and not console.is_dumb_terminal else None

    def say(self, text: str) -> None:
        """One message to the user and the log."""
        self._emit(text, style="")

    def warn(self, text: str) -> None:
        """One message that asks for attention; the run goes on."""
        self._emit(f"warning: {text}", style="yellow")

    def table(self, title: str, rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> None:
        """Rows of cells in aligned columns, under a title."""
        cells = [[str(cell) for cell in row] for row in rows]
        lines = _aligned([list(header), *cells] if header else cells)
        with self._lock:
            self._write_log([title, *lines])
            if self._rich is not None:
                self._rich.print(_rich_table(title, cells, header))
            elif self._stream is not None:
                self._write_plain([title, *lines])

    @contextmanager
    def stage(self, title: str, total: int, start: int = 0) -> Iterator[Bar]:
        """Progress over `total` cycles of which `start` were done before this process began."""
        pace = Pace(total, start, self._clock)
        if self._rich is None:
            bar: Bar = PlainBar(title, pace, self._clock, self._emit_plain_line)
            yield bar
        else:
            bar = LiveBar(title, pace, self._rich, self._emit_log_line)
            self._progress = bar.progress
            try:
                with bar.progress:
                    yield bar
            finally:
                self._progress = None
        bar.finish()
        self.say(f"{title}: {pace.done}/{total} cycles in {_duration(pace.elapsed())}")

    def close(self) -> None:
        """Give the terminal back (a hard exit would leave the cursor hidden) and flush the log. Safe to repeat."""
        with self._lock:
            if self._progress is not None:
                self._progress.stop()
                self._progress = None
            if not self._log.closed:
                self._log.close()

    def _emit(self, text: str, style: str) -> None:
        with self._lock:
            self._write_log([text])
            if self._rich is not None:
                self._rich.print(escape(text), style=style or None)
            elif self._stream is not None:
                self._write_plain([text])

    def _emit_plain_line(self, text: str) -> None:
        self._emit(text, style="")

    def _emit_log_line(self, text: str) -> None:
        with self._lock:
            self._write_log([text])

    def _write_log(self, lines: Sequence[str]) -> None:
        if self._log.closed:
            return  # said after close(): the stream still gets it
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        if self._log.tell() > LARGEST:
            self._log.close()
            before = self._path.with_suffix(".log.1")
            self._path.replace(before)
            self._log = self._path.open("a", encoding="utf-8")
            self._log.write(f"{stamp} {self._prefix} continued from {before.name}\n")
        self._log.writelines(f"{stamp} {self._prefix} {line}\n" for line in lines)
        self._log.flush()

    def _write_plain(self, lines: Sequence[str]) -> None:
        assert self._stream is not None
        self._stream.writelines(f"{self._prefix} {line}\n" for line in lines)
        self._stream.flush()


class Pace:
    """Cycles done, seconds a cycle and seconds to go, from the times at which cycles ended."""

    def __init__(self, total: int, start: int, clock: Callable[[], float]) -> None:
        self.total, self.done = total, start
        self._clock = clock
        self._begin = clock()
        self._ends: deque[tuple[int, float]] = deque([(start, self._begin)], maxlen=_PACE_CYCLES + 1)

    def update(self, cycle: int) -> None:
        """`cycle` cycles are done, counted from the beginning of the stage."""
        self.done = cycle
        self._ends.append((cycle, self._clock()))

    def elapsed(self) -> float:
        return self._clock() - self._begin

    def seconds_per_cycle(self) -> float:
        """Mean over the last cycles; nan before the first one ended."""
        (first, begin), (last, end) = self._ends[0], self._ends[-1]
        return (end - begin) / (last - first) if last > first else math.nan

    def seconds_left(self) -> float:
        return self.seconds_per_cycle() * (self.total - self.done)


class Bar:
    """Progress of one stage; `cycle` counts the cycles that are done."""

    def __init__(self, title: str, pace: Pace) -> None:
        self._title, self._pace = title, pace
        self._values: dict[str, float] = {}
        self._phase = ""

    def update(self, cycle: int, phase: str = "", values: Mapping[str, float] | None = None) -> None:
        """`cycle` cycles are done; `values` are the numbers to show from now on."""
        self._pace.update(cycle)
        self._phase = phase
        self._values.update(values or {})
        self._refresh()

    def phase(self, name: str) -> None:
        """What is being done now. Cheap: call it at each phase of a cycle."""
        self._phase = name

    def finish(self) -> None:
        """The stage ended without an error."""

    def _refresh(self) -> None:
        raise NotImplementedError

    def _line(self) -> str:
        pace = self._pace
        parts = [f"{self._title} {pace.done}/{pace.total}", *_shown(self._values)]
        parts += [f"{_seconds(pace.seconds_per_cycle())}/cycle", f"eta {_duration(pace.seconds_left())}"]
        return "  ".join(parts)


class PlainBar(Bar):
    """Lines for files and pipes: the first cycle, the last one, and in between one every few seconds."""

    def __init__(self, title: str, pace: Pace, clock: Callable[[], float], emit: Callable[[str], None]) -> None:
        super().__init__(title, pace)
        self._clock, self._emit = clock, emit
        self._last_time = -math.inf
        self._last_cycle = -1

    def show(self, values: Mapping[str, float]) -> None:
        """Write a line with these values if one is due; the pace was moved on by the caller."""
        self._values.update(values)
        self._refresh()

    def _refresh(self) -> None:
        if self._clock() - self._last_time >= SECONDS_BETWEEN_LINES:
            self._write()

    def finish(self) -> None:
        # The last cycle is always shown, also of a stage that a stop signal ended early.
        if self._last_cycle not in (-1, self._pace.done):
            self._write()

    def _write(self) -> None:
        self._emit(self._line())
        self._last_time, self._last_cycle = self._clock(), self._pace.done


class LiveBar(Bar):
    """A bar on a terminal, with the phase as it changes. The log file gets the plain lines."""

    def __init__(self, title: str, pace: Pace, console: rich.console.Console, log: Callable[[str], None]) -> None:
        super().__init__(title, pace)
        self._plain = PlainBar(title, pace, time.monotonic, log)
        columns = (_TitleColumn(self), BarColumn(bar_width=24), _StateColumn(self))
        self.progress = Progress(*columns, console=console, refresh_per_second=8)
        self._task = self.progress.add_task(title, total=pace.total, completed=pace.done)

    def _refresh(self) -> None:
        self.progress.update(self._task, completed=self._pace.done)
        self._plain.show(self._values)

    def finish(self) -> None:
        self._plain.finish()

    def title_text(self) -> Text:
        return Text.assemble((self._title, "bold"), f"  {self._pace.done}/{self._pace.total}")

    def state_text(self) -> Text:
        """Phase, values, pace: the parts that change while a cycle runs."""
        pace = self._pace
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(f"{_seconds(pace.seconds_per_cycle())}/cycle  eta {_duration(pace.seconds_left())}", style="cyan")
        if self._values:
            text.append("  " + "  ".join(_shown(self._values)))
        if self._phase:
            text.append(f"  {self._phase}", style="magenta")
        return text


class _TitleColumn(ProgressColumn):
    def __init__(self, bar: LiveBar) -> None:
        super().__init__()
        self._bar = bar

    def render(self, task: Task) -> Text:
        return self._bar.title_text()


class _StateColumn(ProgressColumn):
    def __init__(self, bar: LiveBar) -> None:
        super().__init__()
        self._bar = bar

    def render(self, task: Task) -> Text:
        return self._bar.state_text()


def _shown(values: Mapping[str, float]) -> list[str]:
    """ "loss/dmd": 0.51234 -> "dmd 0.512"; other names keep their prefix."""
    return [f"{name.removeprefix('loss/')} {value:.3g}" for name, value in values.items()]


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "- s"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def _duration(seconds: float) -> str:
    """ "-", "42s", "3m 05s", "2h 07m"."""
    if math.isnan(seconds):
        return "-"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    columns = max((len(row) for row in rows), default=0)
    widths = [max((len(row[index]) for row in rows if index < len(row)), default=0) for index in range(columns)]
    return [("  " + "  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row))).rstrip() for row in rows]


def _rich_table(title: str, rows: Sequence[Sequence[str]], header: Sequence[str]) -> Table:
    table = Table(title=escape(title), title_justify="left", show_header=bool(header), box=None, pad_edge=False)
    for index in range(max((len(row) for row in rows), default=len(header))):
        table.add_column(escape(header[index]) if index < len(header) else "", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table
