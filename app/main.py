"""The page: a header, one tab a task, a footer."""
import inspect
import os
import socket
from dataclasses import dataclass
from typing import Callable, Tuple

# Before Gradio is imported: the demo sends nothing to anybody.
os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')

import gradio as gr

import vishub

from . import classify, deblur, generate, models, predict, slides, tokens, track, ultrasound, volume
from .theme import CSS, theme
from .upload import MAX_FILE_SIZE

__all__ = ['TABS', 'Tab', 'build_app', 'launch']


@dataclass(frozen=True)
class Tab:
    """One tab: its title, its address (`#id` in the page) and the function that fills it."""
    title: str
    id: str
    build: Callable[[gr.Tab], None]


# A task joins the demo with its module and one line here.
TABS: Tuple[Tab, ...] = (
    Tab('Classify', 'classify', classify.build),
    Tab('Deblur', 'deblur', deblur.build),
    Tab('Predict', 'predict', predict.build),
    Tab('Track', 'track', track.build),
    Tab('Ultrasound', 'ultrasound', ultrasound.build),
    Tab('Volume', 'volume', volume.build),
    Tab('Slides', 'slides', slides.build),
    Tab('Generate', 'generate', generate.build),
    Tab('Tokens', 'tokens', tokens.build),
    Tab('Models', 'models', models.build),
)

_HEADER = '<h1>vishub</h1><p>Vision models for PyTorch, in timm\'s style. Try them on your own pictures.</p>'
_FOOTER = f'vishub {vishub.__version__}, Apache-2.0. Everything runs on the machine that serves this page; ' \
          'uploads are deleted after an hour.'


def build_app() -> gr.Blocks:
    """The page, not yet served."""
    # Uploads and drawn results older than an hour are deleted, looked for every ten minutes.
    with gr.Blocks(title='vishub', analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(_HEADER, elem_id='vh-header')
        # On a phone all tabs stay in sight, in several rows; older versions of Gradio hide some behind a menu.
        rows = {'overflow_behavior': 'wrap'} if 'overflow_behavior' in inspect.signature(gr.Tabs).parameters else {}
        with gr.Tabs(elem_id='vh-tabs', **rows):
            for tab in TABS:
                with gr.Tab(tab.title, id=tab.id) as container:
                    tab.build(container)
        gr.HTML(_FOOTER, elem_id='vh-footer')
    return page


def launch(host: str = '127.0.0.1', port: int = 7860, open_browser: bool = False, block: bool = True) -> gr.Blocks:
    """Serve the page and print its address.

    Args:
        host: Address to listen at; `0.0.0.0` for all of this machine's.
        port: TCP port, 1..65535.
        open_browser: Open the page in the default browser.
        block: Serve until interrupted; otherwise return at once (then close the page with `.close()`).

    Raises:
        InputError: If the port cannot be had.
    """
    _check_port(host, port)
    page = build_app()
    page.queue(default_concurrency_limit=2, max_size=64)
    page.launch(
        server_name=host, server_port=port, inbrowser=open_browser, share=False, quiet=True, prevent_thread_lock=True,
        show_error=False,  # an exception that we did not foresee shows as 'Error', not with its text
        theme=theme(), css=CSS, footer_links=[], run_history=False, max_file_size=MAX_FILE_SIZE,
        allowed_paths=[], enable_monitoring=False, pwa=False, mcp_server=False, ssr_mode=False,
    )
    shown = '127.0.0.1' if host in ('0.0.0.0', '::') else host
    print(f'vishub demo: http://{shown}:{port} (Ctrl+C ends it)', flush=True)
    if block:
        page.block_thread()
    return page


def _check_port(host: str, port: int) -> None:
    # Gradio would fail with a traceback, or take another port than the one that was asked for.
    if not 1 <= port <= 65535:
        raise vishub.InputError(f'{port} is not a port: give a number from 1 to 65535')
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does; a port in use still fails
            probe.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        raise vishub.InputError(
            f'cannot serve at {host}:{port} ({reason}): give another port, e.g. --port {min(port + 1, 65535)}'
        ) from error
