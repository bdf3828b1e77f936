"""Progress in a terminal: how far, how fast, how long yet, and which file."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} files/s" if task.speed else "")


class _Name(ProgressColumn):
    # A Text, since a name in brackets is no markup.
    def render(self, task: Task) -> Text:
        return Text(str(task.fields["name"]), overflow="ellipsis", no_wrap=True)


class Progress:
    """A context that shows a bar on stderr; `total` None: of an unknown number of files."""

    def __init__(self, total: int | None) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
        self._bars = Bars(*columns, _Name(), console=Console(stderr=True), transient=True)
        self._files = self._bars.add_task("files", total=total, name="loading the model")
        self._thumbnails = self._bars.add_task("thumbnails", total=total, name="", visible=False)

    def __enter__(self) -> "Progress":
        self._bars.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.__exit__(kind, error, trace)

    def tell(self, text: str) -> None:
        """A line above the bar, which stays."""
        self._bars.console.print(Text(text), soft_wrap=True)

    def advance(self, name: str) -> None:
        """One more file is done."""
        self._bars.update(self._files, advance=1, name=name)

    def thumbnailed(self, name: str) -> None:
        """The thumbnails of one more file are done."""
        self._bars.update(self._thumbnails, advance=1, name=name, visible=True)
