"""The Generate tab: a class in, pictures out, from the first noise on; and all models side by side with their times."""
import html
import random
import time
from dataclasses import replace
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from PIL import Image, ImageDraw

from vishub import InputError
from vishub.tasks import drawing
from vishub.tasks.base import Progress
from vishub.tasks.generation.pipeline import GenerationResult, picture_grid

from .messages import error_sentence, facts_html, failure, notice
from .models import TrainedModel, choose, trained_models
from .parts import model_choice
from .pipelines import PIPELINES
from .work import RunningWork, Stopped, Work

__all__ = ['build', 'compare', 'comparison', 'generate']

TASK = 'generation'
NO_MODELS = 'No model that generates pictures has trained weights yet, so there is nothing to try here. ' \
            'The Models tab lists the architectures.'
_RUNNING = RunningWork()
_NOTHING_YET = 'Choose a class and press Generate. The same seed gives the same pictures.'
_MOMENTS = 16  # of the denoising, in the GIF
_MOST_IMAGES = 16

# preview, pictures, GIF, facts, status, Stop button
Outputs = Tuple[Any, Any, Any, Any, str, Any]


def generate(
        model: str,
        label: str,
        seed: Any,
        count: Any,
        steps: Any,
        guidance: Any,
        solver: str,
        request: Optional[gr.Request] = None,
) -> Iterator[Outputs]:
    """Make pictures; yields what the page shall show, the last time with the pictures or one sentence of error.

    Args:
        model: Name of one of `trained_models`.
        label: Name of the class.
        seed, count, steps, guidance, solver: Options of the pipeline, as the page sends them.
        request: Given by Gradio; tells whose Stop button ends this work.
    """
    previews: List[List[Image.Image]] = []
    try:
        chosen = choose(model, trained_models(TASK))
        options = _options(seed, count, steps, guidance, solver)

        def run(progress: Progress) -> GenerationResult:
            pipe = PIPELINES.get(TASK, chosen.source)
            frames = min(_MOMENTS, options['num_inference_steps'] - 1)
            result: Any = pipe(
                label, **options, frames=frames, progress=progress,
                callback=lambda done, total, pictures: previews.append(pictures))
            return replace(result, model=chosen.name)

        work = Work(run)

        def doing(done: int, total: int) -> str:
            return f'Step {done} of {total} …' if total else f'Loading {chosen.name} …'

        shown = 0
        for status, stop in _RUNNING.watch(work, request, doing):
            preview: Any = gr.skip()
            if len(previews) > shown:  # of several new ones the last
                shown = len(previews)
                preview = _grid(previews[-1])
            yield preview, gr.skip(), gr.skip(), gr.skip(), status, stop
        result = work.result()
    except Stopped:
        yield _page(notice('Stopped.'))
        return
    except Exception as error:
        yield _page(failure(error_sentence(error, 'generating pictures')))
        return
    yield _shown(result)


def compare(
        label: str,
        seed: Any,
        count: Any,
        steps: Any,
        guidance: Any,
        solver: str,
        request: Optional[gr.Request] = None,
) -> Iterator[Outputs]:
    """Make the same pictures with every model that knows the class, one model after the other, and time each.

    See `generate` for the arguments.
    """
    try:
        models = [model for model in trained_models(TASK) if label in model.label_names]
        if len(models) < 2:
            raise InputError(f"only {len(models)} of the models here makes '{label}': there is nothing to compare")
        options = _options(seed, count, steps, guidance, solver)
        now = ['']

        def run(progress: Progress) -> List[Tuple[GenerationResult, float]]:
            results = []
            for number, model in enumerate(models):
                now[0] = model.name
                pipe = PIPELINES.get(TASK, model.source)
                pipe(label, num_images=1, num_inference_steps=2)  # the first call of a model is slower than the others

                def advance(done: int, total: int, before: int = number) -> None:
                    progress(before * total + done, len(models) * total)

                start = time.perf_counter()
                result: Any = pipe(label, **options, progress=advance)
                results.append((replace(result, model=model.name), time.perf_counter() - start))
            return results

        work = Work(run)
        for status, stop in _RUNNING.watch(work, request, lambda done, total: f'{now[0] or "Loading"} …'):
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), status, stop
        results = work.result()
    except Stopped:
        yield _page(notice('Stopped.'))
        return
    except Exception as error:
        yield _page(failure(error_sentence(error, 'comparing the models')))
        return
    facts = '<table class="vh-table"><caption>The same class, seed, steps and guidance</caption><thead><tr><th>Model' \
            '</th><th>Parameters</th><th>Seconds</th></tr></thead><tbody>' + ''.join(
                f'<tr><th>{html.escape(result.model)}</th><td>{result.num_params / 1e6:.2f} M</td>'
                f'<td>{seconds:.2f}</td></tr>' for result, seconds in results) + '</tbody></table>'
    yield _page(notice(f'{label}, {len(results)} models.'), comparison(results), facts=facts)


def comparison(results: List[Tuple[GenerationResult, float]]) -> Image.Image:
    """The pictures of several models side by side, above the model's name and its time in seconds."""
    grids = [picture_grid(result.pictures) for result, _ in results]
    gap, footer = 24, 54
    canvas = Image.new(
        'RGB', (sum(grid.width for grid in grids) + gap * (len(grids) - 1), grids[0].height + footer), drawing.PAPER)
    draw = ImageDraw.Draw(canvas)
    left = 0
    for (result, seconds), grid in zip(results, grids):
        name, small = result.model.partition('.')[0], drawing.font(14)
        top, large = grid.height + 6, drawing.font(18)
        draw.text((left + 4, top), drawing.elide(name, large, grid.width), fill=drawing.INK, font=large)
        draw.text((left + 4, top + 24), f'{seconds:.2f} s', fill=drawing.MUTED, font=small)
        canvas.paste(grid, (left, 0))
        left += grid.width + gap
    return canvas


def _options(seed: Any, count: Any, steps: Any, guidance: Any, solver: str) -> Dict[str, Any]:
    """What the page sent, as the pipeline wants it.

    Raises:
        InputError: If a number is missing or not whole, or there are too many pictures.
    """
    numbers = {}
    for name, value in (('seed', seed), ('num_images', count), ('num_inference_steps', steps)):
        if not isinstance(value, (int, float)) or value != int(value):
            spoken = {'num_images': 'pictures', 'num_inference_steps': 'steps'}.get(name, name)
            raise InputError(f'The number of {spoken} is {value}: give a whole number.'
                             if name != 'seed' else f'The seed is {value}: give a whole number, 0 or more.')
        numbers[name] = int(value)
    if numbers['num_images'] > _MOST_IMAGES:
        raise InputError(f'num_images is {numbers["num_images"]}: give at most {_MOST_IMAGES}')
    return {**numbers, 'guidance_scale': guidance, 'solver': solver}


def _page(
        status: str, preview: Any = None, pictures: Any = None, gif: Any = None, facts: str = '') -> Outputs:
    """The page at rest: what is not given is emptied, and boxes for it are hidden."""
    gallery = gr.Gallery(pictures, visible=pictures is not None)
    return preview, gallery, gr.Image(gif, visible=gif is not None), facts, status, gr.Button(interactive=False)


def _grid(pictures: Sequence[Image.Image]) -> Image.Image:
    return picture_grid(pictures, columns=4 if len(pictures) > 4 else 2)


def _enlarged(result: GenerationResult) -> List[Image.Image]:
    return [picture_grid([picture]) for picture in result.pictures]


def _shown(result: GenerationResult) -> Outputs:
    sentence = result.summary()[0]
    pictures = [(picture, f'seed {own}') for picture, own in zip(_enlarged(result), result.seeds)]
    facts = {
        'Model': result.model,
        'Parameters': f'{result.num_params / 1e6:.2f} M',
        'Time': f'{result.latency_ms * len(result.pictures) / 1000:.2f} s',
        'Pixels': f'{result.pictures[0].width} × {result.pictures[0].height}',
    }
    return _page(
        notice(' '.join([f'{sentence}.', *result.warnings])),
        _grid(result.pictures), pictures, _gif(result), facts_html(facts))


def _gif(result: GenerationResult) -> Optional[str]:
    """Path of the denoising as a GIF, in the folder that Gradio empties."""
    if not result.frames:
        return None
    return save_bytes_to_cache(result.gif(), 'denoising.gif', get_upload_folder())


def _about(model: TrainedModel) -> str:
    text = f'{html.escape(model.summary)}. ' if model.summary else ''
    return f'<div class="vh-note">{text}It makes {len(model.label_names)} classes.</div>'


def build(tab: gr.Tab) -> None:
    """Add the tab's content to the Blocks around it."""
    models = [model for model in trained_models(TASK) if model.label_names]
    if not models:
        gr.HTML(notice(NO_MODELS))
        return
    # the linear one, which the hub is about, first
    models.sort(key=lambda row: not row.name.startswith('lit'))
    by_name = {model.name: model for model in models}
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            label = gr.Dropdown(
                list(models[0].label_names), value=models[0].label_names[0], label='Class', elem_id='vh-gen-class')
            with gr.Row(equal_height=True):
                seed = gr.Number(0, label='Seed', precision=0, minimum=0, min_width=120, elem_id='vh-gen-seed')
                dice = gr.Button('Another seed', size='sm', scale=0, min_width=120, elem_id='vh-gen-dice')
            model = model_choice(models, _about, 'vh-gen-model')
            with gr.Accordion('Options', open=False):
                count = gr.Slider(1, _MOST_IMAGES, value=8, step=1, label='Pictures')
                steps = gr.Slider(2, 100, value=25, step=1, label='Steps', info='More are slower and a little better.')
                guidance = gr.Slider(
                    1, 6, value=2, step=0.25, label='Guidance', info='1 is none; more is more typical, less varied.')
                solver = gr.Dropdown(
                    [('DPM-Solver++ (few steps)', 'dpm++'), ('DDIM (steps that divide 1000)', 'ddim'),
                     ('DDPM (many steps)', 'ddpm')], value='dpm++', label='Solver')
            with gr.Row():
                run = gr.Button('Generate', variant='primary', min_width=120, elem_id='vh-gen-run')
                side = gr.Button('Compare models', min_width=120, elem_id='vh-gen-compare')
                stop = gr.Button('Stop', min_width=80, scale=0, interactive=False, elem_id='vh-gen-stop')
            status = gr.HTML(notice(_NOTHING_YET), elem_id='vh-gen-status')
        with gr.Column(min_width=300):
            preview = gr.Image(
                label='Pictures', show_label=False, interactive=False, format='png',
                buttons=['download', 'fullscreen'], elem_id='vh-gen-preview')
            facts = gr.HTML(elem_id='vh-gen-facts')
            pictures = gr.Gallery(
                label='One by one', columns=4, height='auto', object_fit='contain', format='png', interactive=False,
                buttons=['download', 'fullscreen'], visible=False, elem_id='vh-gen-gallery',
                elem_classes='vh-thumbnails')
            gif = gr.Image(
                label='From noise to pictures', type='filepath', format='gif', interactive=False,
                buttons=['download'], visible=False, elem_id='vh-gen-gif')

    outputs = [preview, pictures, gif, facts, status, stop]
    options = [label, seed, count, steps, guidance, solver]
    # Raw values (preprocess=False): the pipeline says better than Gradio what is wrong with one.
    shared: Dict[str, Any] = dict(
        preprocess=False, show_progress='hidden', trigger_mode='once', api_visibility='private')
    run.click(generate, [model, *options], outputs, **shared)
    side.click(compare, options, outputs, **shared)
    stop.click(_RUNNING.stop, queue=False, show_progress='hidden', api_visibility='private')
    dice.click(
        lambda: random.randrange(100_000), None, seed, show_progress='hidden', api_visibility='private')

    def change_labels(name: str, current: str) -> Any:
        names = list(by_name[name].label_names)
        return gr.Dropdown(names, value=current if current in names else names[0])

    model.change(change_labels, [model, label], label, show_progress='hidden', api_visibility='private')
