"""The Classify tab: a picture in, the likeliest classes and the places that speak for the first of them out."""
import html
from typing import Any, Iterator, List, Optional, Tuple

import gradio as gr

from vishub.tasks import drawing
from vishub.tasks.base import Progress
from vishub.tasks.classification.pipeline import ClassificationResult

from .examples import EXAMPLES, Example
from .messages import error_sentence, facts_html, failure, notice
from .models import TrainedModel, choose, trained_models
from .parts import example_gallery, model_choice, run_and_stop
from .pipelines import PIPELINES
from .upload import picture_input, uploaded
from .work import RunningWork, Stopped, Work

__all__ = ['build', 'classify', 'examples_for']

TASK = 'classification'
NO_MODELS = 'No classification model has trained weights yet, so there is nothing to try here. ' \
            'The Models tab lists the architectures.'
_RUNNING = RunningWork()
_HEATMAP_SIZE = (720, 720)  # width, height in pixels that it is scaled to fit
_NOTHING_YET = 'Choose a picture, paste one, or take an example.'

# label, heat map, facts, status, Stop button
Outputs = Tuple[Any, Any, Any, str, Any]


def classify(
        upload: Optional[dict],
        model: str,
        top_k: int,
        heatmap: bool,
        request: Optional[gr.Request] = None,
) -> Iterator[Outputs]:
    """Classify an upload; yields what the page shall show, the last time with the result or one sentence of error.

    Args:
        upload: Raw value of the picture component.
        model: Name of one of `trained_models`.
        top_k: How many classes.
        heatmap: Draw the heat map.
        request: Given by Gradio; tells whose Stop button ends this work.
    """
    if not upload:
        yield _page(notice(_NOTHING_YET))
        return
    path = name = None
    try:
        path, name = uploaded(upload)
        chosen = choose(model, trained_models(TASK))
        work = Work(lambda progress: _run(chosen, path, top_k, heatmap, progress))

        def doing(done: int, total: int) -> str:
            return f'Looking at {name} …' if total else f'Loading {chosen.name} …'

        for status, stop in _RUNNING.watch(work, request, doing):
            yield gr.skip(), gr.skip(), gr.skip(), status, stop
        result = work.result()
    except Stopped:
        yield _page(notice('Stopped.'))
        return
    except Exception as error:
        yield _page(failure(error_sentence(error, 'classifying the picture', path, name)))
        return
    yield _shown(result, chosen, name)


def _run(
        chosen: TrainedModel,
        path: str,
        top_k: int,
        heatmap: bool,
        progress: Progress,
) -> ClassificationResult:
    pipeline = PIPELINES.get(TASK, chosen.source)
    return pipeline(path, top_k=top_k, heatmap=heatmap, progress=progress)


def _page(status: str, label: Any = None, heatmap: Any = None, facts: str = '') -> Outputs:
    """The page at rest: what is not given is emptied."""
    return label, heatmap, facts, status, gr.Button(interactive=False)


def _shown(result: ClassificationResult, chosen: TrainedModel, name: str) -> Outputs:
    label = {prediction.label: prediction.probability for prediction in result.predictions}
    first = result.predictions[0]
    heatmap = None
    if result.heatmap is not None:
        drawn = drawing.fit(drawing.overlay_heat(result.image, result.heatmap), *_HEATMAP_SIZE)
        heatmap = gr.Image(drawn, label=f'Heat map: yellow speaks for {first.label}')
    facts = facts_html({
        'Model': chosen.name,
        'Parameters': f'{result.num_params / 1e6:.2f} M',
        'Latency': f'{result.latency_ms:.0f} ms',
        'Pixels': f'{result.image.width} × {result.image.height}',
    })
    sentences = [f'{name}: {first.label}, {first.probability:.1%}.', *result.warnings]
    return _page(notice(' '.join(sentences)), label, heatmap, facts)


def examples_for(model: Optional[TrainedModel]) -> List[Example]:
    """The example pictures that suit a model: those of its data set, or all if there are none of it."""
    fitting = [example for example in EXAMPLES if model is not None and example.data == model.tag]
    return fitting or list(EXAMPLES)


def _gallery(examples: List[Example]) -> List[Tuple[str, str]]:
    return [(str(example.path), example.caption) for example in examples]


def _about(model: TrainedModel) -> str:
    text = ''
    if model.summary:
        text = f'{html.escape(model.summary)}. '
    if model.label_names:
        names = html.escape(_listed(model.label_names))
        text += f'It knows {len(model.label_names)} classes and sees one of them in any picture: {names}.'
    return f'<div class="vh-note">{text}</div>'


def _listed(names: Tuple[str, ...], most: int = 20) -> str:
    shown = ', '.join(names[:most])
    return f'{shown}, …' if len(names) > most else shown


def build(tab: gr.Tab) -> None:
    """Add the tab's content to the Blocks around it."""
    models = trained_models(TASK)
    if not models:
        gr.HTML(notice(NO_MODELS))
        return
    by_name = {model.name: model for model in models}
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            picture = picture_input('Picture', height=300, elem_id='vh-picture')
            status = gr.HTML(notice(_NOTHING_YET), elem_id='vh-status')
            examples = example_gallery(_gallery(examples_for(models[0])), 'vh-examples')
            model = model_choice(models, _about, 'vh-model')
            with gr.Accordion('Options', open=False):
                top_k = gr.Slider(1, 10, value=5, step=1, label='How many classes to show')
                heatmap = gr.Checkbox(True, label='Heat map: the places that speak for the first class')
            run, stop = run_and_stop('Classify', 'vh')
        with gr.Column(min_width=300):
            label = gr.Label(label='Likeliest classes', elem_id='vh-label')
            overlay = gr.Image(
                label='Heat map', interactive=False, format='png', buttons=['download', 'fullscreen'],
                elem_id='vh-heatmap',
            )
            facts = gr.HTML(elem_id='vh-facts')

    # Raw values (preprocess=False): see upload.py. `always_last`: of several quick changes only the last one counts.
    gr.on(
        [picture.change, model.change, run.click],
        classify, [picture, model, top_k, heatmap], [label, overlay, facts, status, stop],
        preprocess=False, show_progress='hidden', trigger_mode='always_last', api_visibility='private',
    )
    stop.click(_RUNNING.stop, queue=False, show_progress='hidden', api_visibility='private')

    def take_example(name: str, event: gr.SelectData) -> str:
        return str(examples_for(by_name[name])[event.index].path)

    def change_examples(name: str) -> List[Tuple[str, str]]:
        return _gallery(examples_for(by_name[name]))

    examples.select(take_example, model, picture, show_progress='hidden', api_visibility='private')
    model.change(change_examples, model, examples, show_progress='hidden', api_visibility='private')
