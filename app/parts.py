"""Parts that several tabs have, alike in look and behaviour."""
from typing import Any, Callable, Dict, Sequence, Tuple

import gradio as gr

from .models import TrainedModel

__all__ = ['QUIET', 'example_gallery', 'model_choice', 'plot_picture', 'run_and_stop']

# Of events that are no part of the page's API and draw no spinner over it.
QUIET: Dict[str, Any] = {'show_progress': 'hidden', 'api_visibility': 'private'}


def example_gallery(
        pictures: Sequence[Tuple[str, str]], elem_id: str, label: str = 'Or take an example') -> gr.Gallery:
    """Thumbnails to choose from: (path of a picture, caption) each."""
    return gr.Gallery(
        list(pictures), label=label, columns=3, height='auto', allow_preview=False, object_fit='cover', buttons=[],
        interactive=False, elem_id=elem_id, elem_classes='vh-thumbnails')


def model_choice(models: Sequence[TrainedModel], about: Callable[[TrainedModel], str], elem_id: str) -> gr.Dropdown:
    """The list of models, and below it what `about` says of the chosen one, as HTML."""
    by_name = {model.name: model for model in models}
    choice = gr.Dropdown(list(by_name), value=models[0].name, label='Model', elem_id=elem_id)
    text = gr.HTML(about(models[0]))

    def change_model(name: str) -> str:
        return about(by_name[name])

    choice.change(change_model, choice, text, **QUIET)
    return choice


def run_and_stop(word: str, elem_id: str) -> Tuple[gr.Button, gr.Button]:
    """The button that starts the work, and the one that ends it; `elem_id` is that of the tab."""
    with gr.Row():
        run = gr.Button(word, variant='primary', min_width=120, elem_id=f'{elem_id}-run')
        stop = gr.Button('Stop', min_width=80, scale=0, interactive=False, elem_id=f'{elem_id}-stop')
    return run, stop


def plot_picture(label: str, elem_id: str) -> gr.Image:
    """A picture that a result brings, hidden until there is one."""
    return gr.Image(
        label=label, show_label=False, interactive=False, format='png', buttons=['download', 'fullscreen'],
        visible=False, elem_id=elem_id)
