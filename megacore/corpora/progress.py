"""How far a preparation is: one changing line on a terminal, a line now and then in a log."""

from megacore.corpora.report import count
from megacore.data.prepare import Progress
from megacore.monitor.console import Console, bar, human_count, human_time

LOG_SECONDS = 10.0  # between two progress lines in a log
SCREEN_SECONDS = 0.1  # between two updates of a terminal's line


class ProgressDisplay:
    """Shows the news on a console, only as often as a person can read."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.next_time = 0.0 if console.live else LOG_SECONDS

    def update(self, progress: Progress) -> None:
        """Take the news."""
        if progress.seconds < self.next_time:
            return
        self.next_time = progress.seconds + (SCREEN_SECONDS if self.console.live else LOG_SECONDS)
        if self.console.live:
            self.console.progress(progress_line(progress, bar_width=20))
        else:
            self.console.line(progress_line(progress, bar_width=0))


def progress_line(progress: Progress, bar_width: int) -> str:
    """`[####    ]  42%  1,234 documents  56.7M tokens  12.3 MB/s  ETA 1m02s`; without a share for a pipe."""
    parts = [count(progress.num_documents, "document"), f"{human_count(progress.num_tokens)} tokens", speed(progress)]
    if progress.total:
        share = min(1.0, progress.consumed / progress.total)
        drawn = f"{bar(share, bar_width):<{bar_width}}" if bar_width else ""
        parts.insert(0, f"{drawn}{share:4.0%}")
        if share > 0:
            parts.append(f"ETA {human_time(progress.seconds * (1 - share) / share)}")
    return "  ".join(parts)


def speed(progress: Progress) -> str:
    """Text per second, unpacked."""
    return f"{progress.num_bytes / 1e6 / max(progress.seconds, 1e-9):.1f} MB/s"
