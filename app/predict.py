"""The Predict tab: a clip in, the frames that follow out, animated beside the true ones, with the error of each."""
import base64
import html
import tempfile
from pathlib import Path
from typing import Any, Iterator, List, Optional, Tuple

import gradio as gr
from PIL import Image

from vishub.tasks.base import Progress
from vishub.tasks.video_prediction.pipeline import VideoPredictionResult, encode_animation

from .examples import FOLDER
from .messages import error_sentence, facts_html, failure, notice
from .models import TrainedModel, choose, trained_models
from .parts import example_gallery, model_choice, plot_picture, run_and_stop
from .pipelines import PIPELINES
from .upload import file_input, uploaded
from .work import RunningWork, Stopped, Work

__all__ = ['CLIPS', 'build', 'predict']

TASK = 'video_prediction'
NO_MODELS = 'No video prediction model has trained weights yet, so there is nothing to try here. ' \
            'The Models tab lists the architectures.'
CLIPS = tuple(FOLDER / 'clips' / f'moving-digits-{number}.gif' for number in range(1, 7))
MOST_FRAMES = 48
_NOTHING_YET = 'Choose a clip (a video, an animated GIF or a .npy array), or take an example.'
_RUNNING = RunningWork()

# animation, errors, frames, facts, files, status, Stop button
Outputs = Tuple[Any, Any, Any, str, Any, str, Any]


def predict(
        upload: Optional[dict],
        model: str,
        horizon: int,
        start: int,
        stride: int,
        request: Optional[gr.Request] = None,
) -> Iterator[Outputs]:
    """Predict what follows in an upload; yields what the page shall show, the last time with the result or one
    sentence of error.

    Args:
        upload: Raw value of the file component.
        model: Name of one of `trained_models`.
        horizon: Future frames.
        start: Frame of the clip that is the first given one.
        stride: Take every so manieth frame.
        request: Given by Gradio; tells whose Stop button ends this work.
    """
    if not upload:
        yield _page(notice(_NOTHING_YET))
        return
    path = name = None
    try:
        path, name = uploaded(upload) or ('', '')
        chosen = choose(model, trained_models(TASK))
        work = Work(lambda progress: _run(chosen, path, int(horizon), int(start), int(stride), progress))

        def doing(done: int, total: int) -> str:
            return f'Looking ahead in {name} …' if total else f'Loading {chosen.name} …'

        for status, stop in _RUNNING.watch(work, request, doing):
            yield (*(gr.skip() for _ in range(5)), status, stop)
        result, shown = work.result()
    except Stopped:
        yield _page(notice('Stopped.'))
        return
    except Exception as error:
        yield _page(failure(error_sentence(error, 'predicting the clip', path, name)))
        return
    with tempfile.TemporaryDirectory() as folder:  # Gradio has its own copies when this generator goes on
        yield _shown(result, shown, chosen, name, Path(folder))


def _run(
        chosen: TrainedModel, path: str, horizon: int, start: int, stride: int, progress: Progress,
) -> Tuple[VideoPredictionResult, bytes]:
    """The result, and its animation as GIF: drawing takes longer than a small model."""
    pipeline = PIPELINES.get(TASK, chosen.source)
    result = pipeline(path, horizon=horizon, start=start, stride=stride, progress=progress)
    progress(horizon, horizon)
    return result, encode_animation(result.animation(), result.frame_ms, 'gif')


def _page(
        status: str, animation: Any = '', errors: Any = None, frames: Any = None, facts: str = '', files: Any = None,
) -> Outputs:
    """The page at rest: what is not given is emptied."""
    return animation, errors, frames, facts, files, status, gr.Button(interactive=False)


def _shown(
        result: VideoPredictionResult, animation: bytes, chosen: TrainedModel, name: str, folder: Path) -> Outputs:
    stem = Path(name).stem
    files = []
    for suffix, content in (('.gif', animation), ('.npy', None), ('.json', None)):
        file = folder / f'{stem}.prediction{suffix}'
        if content is None:
            result.save(file)
        else:
            file.write_bytes(content)
        files.append(str(file))
    encoded = base64.b64encode(animation).decode('ascii')
    count = len(result.predicted)
    title = f'{len(result.given)} given frames, then {count} predicted'
    if result.truth is not None:
        title += ' beside the true ones'
    picture = '<figure style="margin:0;text-align:center">' \
              f'<img alt="{title}" style="max-width:100%;height:auto" src="data:image/gif;base64,{encoded}">' \
              f'<figcaption class="vh-note">{title}</figcaption></figure>'
    facts = {
        'Model': chosen.name,
        'Parameters': f'{result.num_params / 1e6:.2f} M',
        'Latency': f'{result.latency_ms:.0f} ms',
        'Pixels': f'{result.given.shape[3]} × {result.given.shape[2]}',
    }
    sentences = [f'{name}: {result.summary()[0]}.']
    chart: Optional[Image.Image] = result.plot_errors()
    if result.errors is not None:
        own, copied = (sum(result.errors[key]) / len(result.errors[key]) for key in ('predicted', 'copied'))
        sentences.append(f'Squared error a frame: {own:.1f}; of the last given frame, copied, {copied:.1f}.')
    else:
        sentences.append('The clip has no frames beyond the given ones, so there is no truth to compare with.')
    return _page(
        notice(' '.join([*sentences, *result.warnings])), picture, gr.Image(chart, visible=chart is not None),
        gr.Image(result.plot_frames(), visible=True), facts_html(facts), gr.File(files, visible=True))


def _about(model: TrainedModel) -> str:
    text = f'{html.escape(model.summary)}. ' if model.summary else ''
    if 'mnist' in model.tag:
        text += 'It has seen nothing but handwritten digits that drift and bounce; other clips it takes for such.'
    return f'<div class="vh-note">{text}</div>'


def build(tab: gr.Tab) -> None:
    """Add the tab's content to the Blocks around it."""
    models = trained_models(TASK)
    if not models:
        gr.HTML(notice(NO_MODELS))
        return
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            clip = file_input('Clip', height=140, elem_id='vh-predict-clip')
            status = gr.HTML(notice(_NOTHING_YET), elem_id='vh-predict-status')
            gallery: List[Tuple[str, str]] = [(str(path), f'Digits {n}') for n, path in enumerate(CLIPS, 1)]
            examples = example_gallery(gallery, 'vh-predict-examples')
            model = model_choice(models, _about, 'vh-predict-model')
            horizon = gr.Slider(1, MOST_FRAMES, value=16, step=1, label='Frames ahead', elem_id='vh-predict-horizon')
            with gr.Accordion('Options', open=False):
                start = gr.Number(0, precision=0, minimum=0, label='First given frame')
                stride = gr.Slider(1, 10, value=1, step=1, label='Take every … frame')
            run, stop = run_and_stop('Predict', 'vh-predict')
        with gr.Column(min_width=300):
            animation = gr.HTML(elem_id='vh-predict-animation')
            facts = gr.HTML(elem_id='vh-predict-facts')
            errors = plot_picture('Error over the horizon', 'vh-predict-errors')
            frames = plot_picture('All frames', 'vh-predict-frames')
            files = gr.File(label='Download', visible=False, interactive=False, elem_id='vh-predict-files')

    # Raw values (preprocess=False): see upload.py. `always_last`: of several quick changes only the last one counts.
    gr.on(
        [clip.change, model.change, horizon.release, run.click],
        predict, [clip, model, horizon, start, stride], [animation, errors, frames, facts, files, status, stop],
        preprocess=False, show_progress='hidden', trigger_mode='always_last', api_visibility='private',
    )
    stop.click(_RUNNING.stop, queue=False, show_progress='hidden', api_visibility='private')

    def take_example(event: gr.SelectData) -> str:
        return str(CLIPS[event.index])

    examples.select(take_example, None, clip, show_progress='hidden', api_visibility='private')
