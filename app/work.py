"""Long work behind a page: it runs in a thread, tells how far it is, and stops when the user has gone or says stop."""
import threading
from typing import Any, Callable, Iterator, Optional, Tuple

from vishub.tasks.base import Progress

__all__ = ['Stopped', 'Work']


class Stopped(Exception):
    """Raised inside the work, at its next report of progress, to end it."""


class Work:
    """One piece of work.

    Use it from a Gradio generator: iterate, yield what the page shall say, then take the result. If Gradio closes the
    generator (Stop button, closed browser tab), the iterator closes too and the work ends at its next report.

    Args:
        function: `function(progress)` does the work and calls `progress(done, total)` now and then.
        poll_seconds: How often the iterator looks.
    """

    def __init__(self, function: Callable[[Progress], Any], poll_seconds: float = 0.1) -> None:
        self._function = function
        self._poll_seconds = poll_seconds
        self._progress: Tuple[int, int] = (0, 0)
        self._stop = threading.Event()
        self._result: Any = None
        self._error: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._run, daemon=True, name='vishub-work')

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def __iter__(self) -> Iterator[Tuple[int, int]]:
        """Start the work and give (done, total) every `poll_seconds` until it ends; (0, 0) while nothing is known."""
        self._thread.start()
        try:
            while True:
                self._thread.join(self._poll_seconds)
                if not self._thread.is_alive():
                    return
                yield self._progress  # even if nothing is new: only a generator that yields can be closed
        finally:
            self._stop.set()

    def result(self) -> Any:
        """What the work returned. Raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._function(self._report)
        except BaseException as error:
            self._error = error

    def _report(self, done: int, total: int) -> None:
        if self._stop.is_set():
            raise Stopped
        self._progress = (done, total)
