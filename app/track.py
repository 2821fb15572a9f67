"""The Track tab: a video and a box in its first frame in, the box in every frame out, with scores and templates."""
import html
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw

from vishub import InputError
from vishub.tasks.base import Progress
from vishub.tasks.clips import open_clip
from vishub.tasks.tracking.collection import UPDATES
from vishub.tasks.tracking.pipeline import TrackingResult

from .examples import FOLDER
from .messages import error_sentence, facts_html, failure, notice
from .models import TrainedModel, choose, trained_models
from .parts import QUIET, example_gallery, model_choice, plot_picture, run_and_stop
from .pipelines import PIPELINES
from .upload import file_input, uploaded
from .work import RunningWork, Stopped, Work

__all__ = ['CLIPS', 'Clip', 'build', 'click', 'first_frame', 'track']

TASK = 'tracking'
NO_MODELS = 'No tracker has trained weights yet, so there is nothing to try here. The Models tab lists the ' \
            'architectures.'
MOST_FRAMES = 900
_SHOWN_SIDE = 720  # of the first frame, in pixels
_NOTHING_YET = 'Choose a video, or take an example. Then mark the target in the first frame: click two opposite ' \
               'corners of its box.'
_MARK = 'Click two opposite corners of the target, then press Track.'
_RUNNING = RunningWork()
_TITLES = {'collection': 'Collection', 'latest': 'Last reliable one', 'none': 'First one alone'}

# video, scores, templates, facts, files, status, Stop button
Outputs = Tuple[Any, Any, Any, str, Any, str, Any]


class Clip(NamedTuple):
    """An example: a generated scene, and the target's box in its first frame."""
    path: Path
    box: Tuple[int, int, int, int]


CLIPS: Tuple[Clip, ...] = tuple(
    Clip(FOLDER / 'tracks' / f'scene-{number}.mp4', box)
    for number, box in enumerate(((130, 132, 36, 21), (131, 61, 43, 37), (20, 45, 27, 26)), 1))


def first_frame(upload: Optional[dict]) -> Tuple[Any, Any, Any, str]:
    """The first frame to draw in, the corners clicked (none yet), the box, and the status.

    The frame is (its pixels, how many of the video's pixels one of them is); of an example the box is known.
    """
    if not upload:
        return None, [], '', notice(_NOTHING_YET)
    path = name = None
    try:
        path, name = uploaded(upload) or ('', '')
        clip = open_clip(path)
        frame = next(iter(clip.read()), None)
        if frame is None or clip.num_frames == 1:
            raise InputError(f"'{name}' has {'no frames' if frame is None else 'one frame'}: choose a video")
    except Exception as error:
        return None, [], '', failure(error_sentence(error, 'reading the video', path, name))
    picture = Image.fromarray(frame.pixels)
    picture.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    scale = frame.pixels.shape[1] / picture.width
    box = next((', '.join(map(str, clip.box)) for clip in CLIPS if clip.path.name == name), '')
    return (np.asarray(picture), scale), [], box, notice(_MARK)


def click(shown: Optional[Tuple[np.ndarray, float]], corners: List[Tuple[int, int]], place: Tuple[int, int]) -> Tuple[
        List[Tuple[int, int]], Any]:
    """A click into the first frame: the corners so far, and the box as text once there are two."""
    if shown is None:
        return [], gr.skip()
    corners = [place] if len(corners) != 1 else [*corners, place]
    if len(corners) < 2:
        return corners, ''
    (x0, x1), (y0, y1) = (sorted(values) for values in zip(*corners))
    box = [round(value * shown[1]) for value in (x0, y0, x1 - x0, y1 - y0)]
    return corners, ', '.join(map(str, box))


def drawn(shown: Optional[Tuple[np.ndarray, float]], corners: List[Tuple[int, int]], box: str) -> Any:
    """The first frame with the box, or with the one corner that was clicked."""
    if shown is None:
        return gr.Image(None, visible=False)
    pixels, scale = shown
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 240))
    try:
        x, y, w, h = (value / scale for value in _numbers(box))
        draw.rectangle((x, y, x + w, y + h), outline=(24, 180, 110), width=width)
    except InputError:
        for x, y in corners[:1]:
            draw.line((x - 9, y, x + 9, y), fill=(24, 180, 110), width=width)
            draw.line((x, y - 9, x, y + 9), fill=(24, 180, 110), width=width)
    return gr.Image(picture, visible=True)


def track(
        upload: Optional[dict],
        box: str,
        model: str,
        update: str,
        min_size: float,
        request: Optional[gr.Request] = None,
) -> Iterator[Outputs]:
    """Track through an upload; yields what the page shall show, the last time with the result or one sentence of error.

    Args:
        upload: Raw value of the file component.
        box: x, y, w, h in pixels, parted by commas.
        model: Name of one of `trained_models`.
        update: One of `UPDATES`.
        min_size: Least side of a box in pixels.
        request: Given by Gradio; tells whose Stop button ends this work.
    """
    if not upload:
        yield _page(notice(_NOTHING_YET))
        return
    path = name = None
    try:
        path, name = uploaded(upload) or ('', '')
        target = _numbers(box)
        chosen = choose(model, trained_models(TASK))
        with tempfile.TemporaryDirectory() as folder:  # Gradio has its own copies when this generator goes on
            work = Work(lambda progress: _run(chosen, path, name, target, update, min_size, Path(folder), progress))

            def doing(done: int, total: int) -> str:
                return f'Tracking through {name}: frame {done} …' if done else f'Loading {chosen.name} …'

            for status, stop in _RUNNING.watch(work, request, doing):
                yield (*(gr.skip() for _ in range(5)), status, stop)
            result, files = work.result()
            yield _shown(result, files, chosen, name)
    except Stopped:
        yield _page(notice('Stopped.'))
    except Exception as error:
        yield _page(failure(error_sentence(error, 'tracking', path, name)))


def _numbers(box: str) -> List[float]:
    try:
        numbers = [float(word) for word in str(box).replace(';', ',').split(',')]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise InputError(
            'Mark the target first: click two opposite corners of its box in the first frame, or write x, y, width, '
            'height')
    return numbers


def _run(
        chosen: TrainedModel, path: str, name: str, box: List[float], update: str, min_size: float, folder: Path,
        progress: Progress,
) -> Tuple[TrackingResult, List[Path]]:
    """The result and its files: drawing takes longer than a small model."""
    pipeline = PIPELINES.get(TASK, chosen.source)
    result = pipeline(
        path, box=box, template_update=update, min_size=min_size or 10, limit=MOST_FRAMES, progress=progress)
    files = []
    for suffix in ('.mp4', '.csv', '.json'):
        progress(len(result), len(result))  # the place to stop
        files.append(result.save(folder / f'{Path(name).stem}.track{suffix}'))
    return result, files


def _page(
        status: str, video: Any = None, scores: Any = None, templates: Any = None, facts: str = '', files: Any = None,
) -> Outputs:
    """The page at rest: what is not given is emptied."""
    return video, scores, templates, facts, files, status, gr.Button(interactive=False)


def _shown(result: TrackingResult, files: List[Path], chosen: TrainedModel, name: str) -> Outputs:
    facts: Dict[str, str] = {
        'Model': chosen.name,
        'Frames': f'{len(result)} of {result.size[0]} × {result.size[1]}',
        'Speed': f'{result.fps:.0f} frames a second',
        'Templates': f'{result.num_templates[-1]} in use, {int(result.changed.sum())} changes',
    }
    sentences = [f'{name}: {". ".join(result.summary())}.', *result.warnings]
    if len(result) == MOST_FRAMES:
        sentences.append(f'Only the first {MOST_FRAMES} frames were tracked; the command line takes all.')
    templates = [
        (Image.fromarray(one.pixels).resize((144, 144), Image.Resampling.BICUBIC),
         ('first frame' if one.frame == 0 else f'frame {one.frame}, {one.reliability:.2f}')
         + ('' if one.in_use else ', gone'))
        for one in result.templates]
    return _page(
        notice(' '.join(sentences)), gr.Video(str(files[0]), visible=True),
        gr.Image(result.plot_scores(), visible=True), gr.Gallery(templates, visible=True), facts_html(facts),
        gr.File([str(file) for file in files], visible=True))


def _about(model: TrainedModel) -> str:
    text = f'{html.escape(model.summary)}. ' if model.summary else ''
    if 'scenes' in model.tag:
        text += 'It has seen nothing but patches that drift over photographs; real targets it may well lose. '
    return f'<div class="vh-note">{text}BACTrack-style, not a reproduction of the paper.</div>'


def build(tab: gr.Tab) -> None:
    """Add the tab's content to the Blocks around it."""
    models = trained_models(TASK)
    if not models:
        gr.HTML(notice(NO_MODELS))
        return
    shown, corners = gr.State(None), gr.State([])
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            clip = file_input('Video', height=140, elem_id='vh-track-clip')
            status = gr.HTML(notice(_NOTHING_YET), elem_id='vh-track-status')
            first = gr.Image(
                label='First frame: click two opposite corners of the target', interactive=False, format='png',
                buttons=[], visible=False, elem_id='vh-track-first')
            box = gr.Textbox(
                label='Target: x, y, width, height in pixels', placeholder='310, 140, 42, 30', max_lines=1,
                elem_id='vh-track-box')
            run, stop = run_and_stop('Track', 'vh-track')
            gallery: List[Tuple[str, str]] = [
                (str(one.path.with_suffix('.png')), f'Scene {number}') for number, one in enumerate(CLIPS, 1)]
            examples = example_gallery(gallery, 'vh-track-examples')
            model = model_choice(models, _about, 'vh-track-model')
            update = gr.Radio(
                [(_TITLES[name], name) for name in UPDATES], value=UPDATES[0], label='Templates',
                elem_id='vh-track-update')
            with gr.Accordion('Options', open=False):
                min_size = gr.Number(10, minimum=1, label='Least side of a box, in pixels')
        with gr.Column(min_width=300):
            video = gr.Video(
                label='Tracked', interactive=False, autoplay=True, loop=True, visible=False, elem_id='vh-track-video')
            facts = gr.HTML(elem_id='vh-track-facts')
            scores = plot_picture('Scores over time', 'vh-track-scores')
            templates = gr.Gallery(
                label='Templates that joined the collection', columns=3, height='auto', allow_preview=False,
                object_fit='contain', buttons=[], interactive=False, visible=False, elem_id='vh-track-templates',
                elem_classes='vh-thumbnails')
            files = gr.File(label='Download', visible=False, interactive=False, elem_id='vh-track-files')

    def clicked(event: gr.SelectData, shown: Any, corners: Any) -> Any:
        return click(shown, corners, (int(event.index[0]), int(event.index[1])))

    # Raw values (preprocess=False): see upload.py.
    clip.change(first_frame, clip, [shown, corners, box, status], preprocess=False, **QUIET).then(
        drawn, [shown, corners, box], first, **QUIET)
    first.select(clicked, [shown, corners], [corners, box], **QUIET).then(
        drawn, [shown, corners, box], first, **QUIET)
    box.submit(drawn, [shown, corners, box], first, **QUIET)
    run.click(
        track, [clip, box, model, update, min_size], [video, scores, templates, facts, files, status, stop],
        preprocess=False, trigger_mode='once', **QUIET)
    stop.click(_RUNNING.stop, queue=False, **QUIET)

    def take_example(event: gr.SelectData) -> str:
        return str(CLIPS[event.index].path)

    examples.select(take_example, None, clip, **QUIET)
