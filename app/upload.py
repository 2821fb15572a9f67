"""Files from the browser. Gradio keeps the bytes; the pipeline alone decodes them, and says what is wrong with them.

Gradio's own decoding would turn a damaged picture into an exception before our code sees it. So listeners that take a
picture are registered with `preprocess=False` and get the description of the stored file, which `uploaded` reads.
Gradio has checked by then that the file lies in its upload folder.
"""
from typing import Any, NoReturn, Optional, Tuple

import gradio as gr

from vishub import InputError

__all__ = ['MAX_FILE_SIZE', 'file_input', 'picture_input', 'uploaded']

MAX_FILE_SIZE = '40mb'


def picture_input(label: str, **kwargs: Any) -> gr.Image:
    """An image component for upload, paste and drop that never fetches an address for a client."""
    return _files_only(
        gr.Image(label=label, type='filepath', image_mode=None, sources=['upload', 'clipboard'], **kwargs))


def file_input(label: str, **kwargs: Any) -> gr.File:
    """A component for upload and drop of one file of any kind that never fetches an address for a client."""
    return _files_only(gr.File(label=label, file_count='single', type='filepath', **kwargs))


def _files_only(component: Any) -> Any:
    move = component.async_move_resource_to_block_cache

    async def move_files_only(path: Any) -> Any:
        # Gradio would download an address that a client names in place of a file.
        if '://' in str(path):
            _refuse_address()
        return await move(path)

    component.async_move_resource_to_block_cache = move_files_only
    return component


def _refuse_address() -> NoReturn:
    raise gr.Error('An address is not a file: upload the file itself.', print_exception=False)


def uploaded(value: Optional[dict]) -> Optional[Tuple[str, str]]:
    """Path on the server and the file's own name, or None if none was chosen.

    Args:
        value: What a listener with `preprocess=False` gets from a `picture_input` or a `file_input`.

    Raises:
        InputError: If it is not a stored file.
    """
    if not value:
        return None
    path = value.get('path')
    if not path:
        raise InputError('This is not an uploaded file: choose a file, or paste a picture.')
    return path, value.get('orig_name') or path.replace('\\', '/').rpartition('/')[2]
