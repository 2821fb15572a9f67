"""What the page says while it works and when something goes wrong: always a sentence, never a stack trace."""
import html
import logging
from typing import Dict, Optional

from vishub import InputError, MissingExtraError, UnknownNameError, WeightsNotFoundError

__all__ = ['busy', 'error_sentence', 'facts_html', 'failure', 'notice']

_log = logging.getLogger('vishub.app')

# Errors whose message was written for the user.
_SPOKEN = (InputError, MissingExtraError, UnknownNameError, WeightsNotFoundError)


def notice(text: str) -> str:
    """A sentence in a box, as HTML."""
    return f'<div class="vh-status" role="status">{html.escape(text)}</div>'


def busy(text: str, done: Optional[float] = None) -> str:
    """A sentence with a progress bar, as HTML.

    Args:
        text: What is being done.
        done: Fraction done, 0..1; unknown if None (the bar then moves).
    """
    value = '' if done is None else f' value="{done:.3f}"'
    return f'<div class="vh-status" role="status">{html.escape(text)}<progress{value}></progress></div>'


def failure(text: str) -> str:
    """A sentence that says what went wrong, as HTML."""
    return f'<div class="vh-status vh-error" role="alert">{html.escape(text)}</div>'


def facts_html(facts: Dict[str, str]) -> str:
    """Short facts, each a name and a value, as an HTML definition list."""
    items = (f'<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>' for key, value in facts.items())
    return f'<dl class="vh-facts">{"".join(items)}</dl>'


def error_sentence(error: Exception, doing: str, path: Optional[str] = None, name: Optional[str] = None) -> str:
    """The sentence for an exception. Those that are not meant for the user go to the log with their traceback.

    Args:
        error: What was raised.
        doing: What was being done, e.g. `classifying`.
        path: Where the upload lies on the server; the user sees `name` instead.
        name: The upload's own file name.
    """
    if isinstance(error, _SPOKEN):
        sentence = str(error).replace(path, name or 'the file') if path else str(error)
        return sentence if sentence.endswith(('.', '!', '?')) else f'{sentence}.'
    _log.error('Failed while %s.', doing, exc_info=error)
    return f'Something went wrong while {doing}; the log of the server has the details.'
