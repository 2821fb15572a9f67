"""Long work behind a page: it runs in a thread, tells how far it is, and stops when the user has gone or says stop."""
import contextlib
import threading
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import gradio as gr

from vishub.tasks.base import Progress

from .messages import busy

__all__ = ['RunningWork', 'Stopped', 'Work']


class Stopped(Exception):
    """Raised inside the work, at its next report of progress, to end it."""


class Work:
    """One piece of work.

    Use it from a Gradio generator: iterate, yield what the page shall say, then take the result. If Gradio closes the
    generator (closed browser tab), the iterator closes too and the work ends at its next report, as after `stop`.

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

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        """End the work at its next report; `result` then raises `Stopped`."""
        self._stop.set()

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


class RunningWork:
    """The work of each visitor, for the Stop button to find.

    The button does not cancel Gradio's event: what the event had already sent could reach the page behind the button's
    own answer, and the page would say 'Looking at …' for ever. It stops the work, and the event says the last word.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._works: Dict[Optional[str], Work] = {}

    def watch(
            self, work: Work, request: Optional[gr.Request], doing: Callable[[int, int], str],
    ) -> Iterator[Tuple[str, gr.Button]]:
        """Do `work` as that of the visitor, and give what the status line and the Stop button shall show meanwhile.

        Args:
            work: What to do. Its result is there when the iterator has ended.
            request: Given by Gradio; None stands for one visitor without a session.
            doing: `doing(done, total)` says what is being done; total is 0 while nothing is known.
        """
        with self._of(_visitor(request), work):
            for done, total in work:
                text = 'Stopping …' if work.is_stopping else doing(done, total)
                yield busy(text, done / total if total > 1 else None), gr.Button(interactive=not work.is_stopping)

    def stop(self, request: gr.Request) -> None:
        """Stop the visitor's work, if there is any. The event of the Stop button."""
        with self._lock:
            work = self._works.get(_visitor(request))
        if work is not None:
            work.stop()

    @contextlib.contextmanager
    def _of(self, visitor: Optional[str], work: Work) -> Iterator[None]:
        with self._lock:
            self._works[visitor] = work
        try:
            yield
        finally:
            with self._lock:
                if self._works.get(visitor) is work:
                    del self._works[visitor]


def _visitor(request: Optional[gr.Request]) -> Optional[str]:
    return request.session_hash if request is not None else None
