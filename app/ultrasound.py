"""The Ultrasound tab: a clip in, the clip with its lesion marked out, and its area over time. Research use only."""
import html
import tempfile
from pathlib import Path
from typing import Any, Iterator, List, Optional, Tuple

import gradio as gr

from vishub.tasks.base import Progress
from vishub.tasks.video_segmentation.result import NOTICE, VideoSegmentationResult

from .examples import FOLDER
from .messages import error_sentence, facts_html, failure, notice
from .models import TrainedModel, choose, trained_models
from .parts import example_gallery, model_choice, plot_picture, run_and_stop
from .pipelines import PIPELINES
from .upload import file_input, uploaded
from .work import RunningWork, Stopped, Work

__all__ = ['CLIPS', 'build', 'segment']

TASK = 'video_segmentation'
NO_MODELS = 'No model of ultrasound clips has trained weights yet, so there is nothing to try here. ' \
            'The Models tab lists the architectures.'
CLIPS = tuple(FOLDER / 'ultrasound' / f'phantom-{name}.gif' for name in ('linear-1', 'linear-2', 'sector-1'))
MOST_FRAMES = 600
_NOTHING_YET = 'Choose a clip (a video, a DICOM clip or an animated GIF), or take an example.'
_RUNNING = RunningWork()

# overlay, area, frames, facts, files, status, Stop button
Outputs = Tuple[Any, Any, Any, str, Any, str, Any]


def segment(
        upload: Optional[dict],
        model: str,
        start: int,
        stride: int,
        request: Optional[gr.Request] = None,
) -> Iterator[Outputs]:
    """Mark the lesion in an upload; yields what the page shall show, the last time with the result or one sentence of
    error.

    Args:
        upload: Raw value of the file component.
        model: Name of one of `trained_models`.
        start: First frame, from 0.
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
        with tempfile.TemporaryDirectory() as folder:  # Gradio has its own copies when this generator goes on
            work = Work(lambda progress: _run(chosen, path, name, int(start), int(stride), Path(folder), progress))

            def doing(done: int, total: int) -> str:
                return f'Looking at {name}: {done} frames …' if done else f'Loading {chosen.name} …'

            for status, stop in _RUNNING.watch(work, request, doing):
                yield (*(gr.skip() for _ in range(5)), status, stop)
            result, files = work.result()
            yield _shown(result, files, chosen, name)
    except Stopped:
        yield _page(notice('Stopped.'))
    except Exception as error:
        yield _page(failure(error_sentence(error, 'looking at the clip', path, name)))


def _run(
        chosen: TrainedModel, path: str, name: str, start: int, stride: int, folder: Path, progress: Progress,
) -> Tuple[VideoSegmentationResult, List[Path]]:
    """The result and its files: drawing takes longer than a small model."""
    pipeline = PIPELINES.get(TASK, chosen.source)
    result = pipeline(path, start=start, count=MOST_FRAMES, stride=stride, progress=progress)
    stem = Path(name).stem
    files = []
    for suffix in ('.mp4', '.zip', '.csv'):
        progress(len(result), len(result))  # the place to stop
        files.append(result.save(folder / f'{stem}.segmentation{suffix}'))
    return result, files


def _page(
        status: str, clip: Any = None, area: Any = None, frames: Any = None, facts: str = '', files: Any = None,
) -> Outputs:
    """The page at rest: what is not given is emptied."""
    return clip, area, frames, facts, files, status, gr.Button(interactive=False)


def _shown(result: VideoSegmentationResult, files: List[Path], chosen: TrainedModel, name: str) -> Outputs:
    facts = {
        'Model': chosen.name,
        'Frames': f'{len(result)} of {result.width} × {result.height}',
        'Latency': f'{result.latency_ms:.0f} ms a frame',
        'Scale': 'none in the file' if result.spacing is None else f'{10 * result.spacing[0]:.3f} mm a row',
    }
    sentences = [f'{name}: {"; ".join(result.summary()[:-1])}. {NOTICE}', *result.warnings]
    if len(result) == MOST_FRAMES:
        sentences.append(f'Only the first {MOST_FRAMES} frames were looked at; the command line takes all.')
    clip, area, frames = (
        gr.Video(str(files[0]), visible=True), gr.Image(result.plot_area(), visible=True),
        gr.Image(result.plot_frames(), visible=True))
    return _page(
        notice(' '.join(sentences)), clip, area, frames, facts_html(facts), gr.File([*map(str, files)], visible=True))


def _about(model: TrainedModel) -> str:
    text = f'{html.escape(model.summary)}. ' if model.summary else ''
    if 'phantoms' in model.tag:
        text += 'It has seen nothing but computer-made phantoms; on a patient\'s clip it marks dark patches, ' \
                'whatever they are. '
    return f'<div class="vh-note">{text}<b>{NOTICE}</b> Clips stay on the machine that serves this page; text that ' \
           'is burned into the frames, such as a name, stays in them.</div>'


def build(tab: gr.Tab) -> None:
    """Add the tab's content to the Blocks around it."""
    models = trained_models(TASK)
    if not models:
        gr.HTML(notice(NO_MODELS))
        return
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            clip = file_input('Clip', height=140, elem_id='vh-ultrasound-clip')
            status = gr.HTML(notice(_NOTHING_YET), elem_id='vh-ultrasound-status')
            gallery: List[Tuple[str, str]] = [
                (str(path), title) for path, title in zip(CLIPS, ('Linear 1', 'Linear 2', 'Sector'))]
            examples = example_gallery(gallery, 'vh-ultrasound-examples')
            model = model_choice(models, _about, 'vh-ultrasound-model')
            with gr.Accordion('Options', open=False):
                start = gr.Number(0, precision=0, minimum=0, label='First frame')
                stride = gr.Slider(1, 10, value=1, step=1, label='Take every … frame')
            run, stop = run_and_stop('Segment', 'vh-ultrasound')
        with gr.Column(min_width=300):
            shown = gr.Video(
                label='Marked clip', interactive=False, autoplay=True, loop=True, visible=False,
                elem_id='vh-ultrasound-overlay')
            facts = gr.HTML(elem_id='vh-ultrasound-facts')
            area = plot_picture('Area over time', 'vh-ultrasound-area')
            frames = plot_picture('Some frames', 'vh-ultrasound-frames')
            files = gr.File(label='Download', visible=False, interactive=False, elem_id='vh-ultrasound-files')

    # Raw values (preprocess=False): see upload.py. `always_last`: of several quick changes only the last one counts.
    gr.on(
        [clip.change, model.change, run.click],
        segment, [clip, model, start, stride], [shown, area, frames, facts, files, status, stop],
        preprocess=False, show_progress='hidden', trigger_mode='always_last', api_visibility='private',
    )
    stop.click(_RUNNING.stop, queue=False, show_progress='hidden', api_visibility='private')

    def take_example(event: gr.SelectData) -> str:
        return str(CLIPS[event.index])

    examples.select(take_example, None, clip, show_progress='hidden', api_visibility='private')
