"""The Models tab: every family and architecture of the catalogue, with its weights and what they scored."""
import functools
import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import gradio as gr

from vishub import InputError, catalog
from vishub.hub import weights_folders
from vishub.models.cost import count_parameters
from vishub.tasks.base import pipeline_class

__all__ = ['TrainedModel', 'build', 'choose', 'families_html', 'trained_models']

_ALL = 'all tasks'


@dataclass(frozen=True)
class TrainedModel:
    """Weights on this machine that a tab can offer.

    Attributes:
        name: `<arch>.<tag>`, what the user sees and chooses.
        source: What a pipeline loads: `name`, or `local-dir:…` for weights that the catalogue does not have.
        label_names: Its classes, empty if the folder does not tell.
        summary: Data and metric in a few words, empty if unknown.
        in_chans: Channels of its input.
    """
    name: str
    source: str
    label_names: Tuple[str, ...]
    summary: str
    in_chans: int = 3

    @property
    def tag(self) -> str:
        return self.name.partition('.')[2]


def trained_models(task: str) -> List[TrainedModel]:
    """The models of a task whose weights are here (came with vishub, or lie in the folders of VISHUB_WEIGHTS).

    The task's default model comes first, the others by name.
    """
    of_task = {row.name for row in catalog.architectures(task)}
    rows = {row.name: row for row in catalog.weights()}
    models = []
    for name, folder in weights_folders().items():
        if name.partition('.')[0] not in of_task:
            continue
        row = rows.get(name)
        summary = f'Trained on {row.data}; {row.metric} {row.value:g} on its test split' if row else ''
        config = _config(folder)
        channels = (config.get('pretrained_cfg') or {}).get('input_size') or (3,)
        models.append(TrainedModel(
            name, name if row else f'local-dir:{folder}', tuple(config.get('label_names') or ()), summary, channels[0]))
    default = pipeline_class(task).default_model
    return sorted(models, key=lambda model: model.name != default)


def choose(name: str, models: Sequence[TrainedModel]) -> TrainedModel:
    """The model of that name, as the page sent it.

    Raises:
        InputError: If none has it.
    """
    for model in models:
        if model.name == name:
            return model
    raise InputError(f"There is no model '{name}' here: choose one from the list.")


def _config(folder: Path) -> Dict[str, Any]:
    try:
        return dict(json.loads((folder / 'config.json').read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError):
        return {}


_parameters = functools.cache(count_parameters)  # counted once, when the tab is first opened


def families_html(task: str = _ALL) -> str:
    """The catalogue as HTML cards, one a family; `task` limits them to one task."""
    cards = [_card(family) for family in catalog.families() if task in (_ALL, family.task)]
    return f'<div class="vh-families">{"".join(cards)}</div>'


def _card(family: catalog.Family) -> str:
    text = html.escape
    architectures = [row for row in catalog.architectures() if row.family == family.name]
    code = text(family.code_licence)
    if family.repository:
        code = f'<a href="https://github.com/{text(family.repository)}" target="_blank" rel="noopener">' \
               f'{text(family.repository)}</a> ({code})'
    rows = ''.join(
        f'<tr><td>{text(row.name)}</td><td>{"×".join(map(str, row.input))}</td>'
        f'<td class="vh-number">{_parameters(row.name) / 1e6:.2f} M</td></tr>'
        for row in architectures
    )
    table = '<table><thead><tr><th>architecture</th><th>input</th><th class="vh-number">parameters</th></tr></thead>' \
            f'<tbody>{rows}</tbody></table>' if rows else '<p class="vh-note">Not in this version yet.</p>'
    return (
        f'<article class="vh-family"><h3>{text(family.name)}'
        f'<span class="vh-task">{text(_spoken(family.task))}</span></h3>'
        f'<p><a href="https://arxiv.org/abs/{text(family.arxiv)}" target="_blank" rel="noopener">'
        f'{text(family.title)}</a></p>'
        f'<p class="vh-note">{text(family.notes)} Official code: {code}. vishub\'s code: Apache-2.0.</p>'
        f'{table}{_weights([row.name for row in architectures])}</article>'
    )


def _weights(architectures: List[str]) -> str:
    rows = [row for row in catalog.weights() if row.architecture in architectures]
    if not rows:
        return '<p class="vh-note">No trained weights yet.</p>' if architectures else ''
    text = html.escape
    body = ''.join(
        f'<tr><td>{text(row.name)}</td><td>{text(row.data)}</td>'
        f'<td class="vh-number">{text(row.metric)} {row.value:g}</td><td>{text(row.licence)}</td></tr>'
        for row in rows
    )
    return '<table><thead><tr><th>weights</th><th>data</th><th class="vh-number">test split</th><th>licence</th></tr>' \
           f'</thead><tbody>{body}</tbody></table>'


def _spoken(task: str) -> str:
    return task.replace('_', ' ')


def build(tab: gr.Tab) -> None:
    """Add the tab's content to the Blocks around it."""
    choices = [(_ALL, _ALL)] + [(_spoken(task), task) for task in catalog.tasks()]
    task = gr.Dropdown(choices, value=_ALL, label='Task', elem_id='vh-task')
    cards = gr.HTML(elem_id='vh-models')
    # When the tab is opened, so that counting parameters does not delay the start.
    gr.on([tab.select, task.input], families_html, task, cards, api_visibility='private', show_progress='minimal')
