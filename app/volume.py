"""The Volume tab: a scan in, the organ of every voxel out, in planes to leaf through, in millilitres, as a mesh."""
import base64
import html
import io
import tempfile
from pathlib import Path
from typing import Any, Iterator, List, Optional, Tuple

import gradio as gr
import numpy as np
from PIL import Image

from vishub.tasks.base import Progress
from vishub.tasks.volume_segmentation.picture import AXES, busiest, colours
from vishub.tasks.volume_segmentation.pipeline import VolumeSegmentationResult

from .examples import FOLDER
from .messages import error_sentence, facts_html, failure, notice
from .models import TrainedModel, choose, trained_models
from .parts import model_choice, run_and_stop
from .pipelines import PIPELINES
from .upload import file_input, uploaded
from .work import RunningWork, Stopped, Work

__all__ = ['EXAMPLE', 'build', 'segment', 'surfaces']

TASK = 'volume_segmentation'
NO_MODELS = 'No volume segmentation model has trained weights yet, so there is nothing to try here. ' \
            'The Models tab lists the architectures.'
RESEARCH_ONLY = 'For research only: this is no medical device, and nothing it shows may decide on the treatment of ' \
                'anybody. Do not upload scans of people whose consent you do not have.'
EXAMPLE = FOLDER / 'volumes' / 'organ-and-tubes.nii.gz'
_NOTHING_YET = 'Choose a scan (NIfTI, NRRD, or a zip of one DICOM series), or take the example.'
_RUNNING = RunningWork()
_MOST_PLANES = 40  # of each direction, evenly spread: more would make the page heavy
_SIDE = 256

# planes, volumes, facts, files, status, Stop button
Outputs = Tuple[str, str, str, Any, str, Any]


def segment(
        upload: Optional[dict],
        model: str,
        channel: Optional[float],
        mirror: bool,
        request: Optional[gr.Request] = None,
) -> Iterator[Outputs]:
    """Segment an upload; yields what the page shall show, the last time with the result or one sentence of error.

    Args:
        upload: Raw value of the file component.
        model: Name of one of `trained_models`.
        channel: Of a 4-D file, the entry of its fourth axis; None for none.
        mirror: Average over mirrored copies.
        request: Given by Gradio; tells whose Stop button ends this work.
    """
    if not upload:
        yield _page(notice(_NOTHING_YET))
        return
    path = name = None
    with tempfile.TemporaryDirectory() as folder:  # Gradio has its own copies when this generator goes on
        try:
            path, name = uploaded(upload) or ('', '')
            chosen = choose(model, _models())
            number = None if channel is None else int(channel)
            work = Work(lambda progress: _run(chosen, path, name, number, mirror, Path(folder), progress))

            def doing(done: int, total: int) -> str:
                return f'Looking through {name} …' if total else f'Reading {name} …'

            for status, stop in _RUNNING.watch(work, request, doing):
                yield (*(gr.skip() for _ in range(4)), status, stop)
            shown = work.result()
        except Stopped:
            shown = _page(notice('Stopped.'))
        except Exception as error:
            shown = _page(failure(error_sentence(error, 'segmenting the volume', path, name)))
        yield shown


def _run(
        chosen: TrainedModel, path: str, name: str, channel: Optional[int], mirror: bool, folder: Path,
        progress: Progress) -> Outputs:
    """All that is shown, files and pictures made: that takes as long as a small model."""
    pipeline = PIPELINES.get(TASK, chosen.source)
    result: Any = pipeline(path, channel=channel, mirror=mirror, progress=progress)
    stem = name
    for suffix in ('.gz', '.nii', '.nrrd', '.zip', '.dcm'):
        stem = stem[:-len(suffix)] if stem.lower().endswith(suffix) else stem
    suffixes = ['.nii.gz', *(['.glb'] if any(result.volumes_ml.values()) else []), '.png']
    files = [str(result.save(folder / f'{stem}.mask{suffix}')) for suffix in suffixes]
    facts = {
        'Model': chosen.name,
        'Voxels': ' × '.join(map(str, result.grid.shape)),
        'Spacing': ' × '.join(f'{v:.3g}' for v in result.grid.file_spacing) + ' mm',
        'Time': f'{result.latency_ms / 1000:.1f} s',
    }
    found = [f'{label} {volume:,.1f} ml' for label, volume in result.volumes_ml.items() if volume]
    sentence = f'{name}: {", ".join(found) if found else "none of the classes was found"}. For research only.'
    return _page(
        notice(' '.join([sentence, *result.warnings])), planes_html(result), volumes_html(result), facts_html(facts),
        gr.File(files, visible=True))


def _page(status: str, planes: str = '', volumes: str = '', facts: str = '', files: Any = None) -> Outputs:
    """The page at rest: what is not given is emptied."""
    return planes, volumes, facts, files, status, gr.Button(interactive=False)


def surfaces(files: Any) -> Any:
    """The mesh among the files of a result, for its viewer, which is hidden if there is none.

    Gradio's viewer stays empty when its value is set again while its script is being loaded (gradio 6.31; see
    gradio-app/gradio issue 12158). What a generator yields last reaches the page twice, so this is an event of its own;
    and showing a component that was not in the page sets it twice, so this one is hidden in it.
    """
    paths = [str(file) for file in (files if isinstance(files, list) else [files]) if file]
    mesh = next((path for path in paths if path.endswith('.glb')), None)
    return gr.Model3D(mesh, visible='hidden' if mesh is None else True)


# A slider shows one figure of its own group; the opacity slider goes over all masks of the page.
_SHOW_PLANE = "this.parentNode.querySelectorAll('figure').forEach((plane, i) => plane.hidden = i != this.value)"
_FADE = "this.closest('.vh-volume').style.setProperty('--vh-mask', this.value / 100)"


def planes_html(result: VolumeSegmentationResult) -> str:
    """Sliders through the axial, coronal and sagittal planes, the mask laid over the scan, as HTML."""
    groups = []
    for axis, name in enumerate(AXES):
        count = result.mask.shape[axis]
        shown = sorted({*np.linspace(0, count - 1, min(count, _MOST_PLANES)).round().astype(int).tolist(),
                        busiest(result.mask, axis)})
        first = shown.index(busiest(result.mask, axis))
        figures = ''.join(
            f'<figure{"" if place == first else " hidden"}><div>'
            f'<img src="{_address(result.plane(axis, index, 0., _SIDE).convert("L"), "JPEG")}" '
            f'alt="{name} plane {index + 1}">'
            f'<img class="vh-mask" src="{_address(_mask_picture(result, axis, index), "PNG")}" alt="">'
            f'</div><figcaption>{name}, {index + 1} of {count}</figcaption></figure>'
            for place, index in enumerate(shown))
        slider = f'<input type="range" min="0" max="{len(shown) - 1}" step="1" value="{first}" ' \
                 f'aria-label="{name} plane" oninput="{_SHOW_PLANE}">'
        groups.append(f'<div class="vh-plane">{figures}{slider}</div>')
    fade = '<label class="vh-note">Mask <input type="range" min="0" max="100" value="50" ' \
           f'aria-label="Opacity of the mask" oninput="{_FADE}"></label>'
    return f'<div class="vh-volume"><div class="vh-planes">{"".join(groups)}</div>{fade}</div>'


def _mask_picture(result: VolumeSegmentationResult, axis: int, index: int) -> Image.Image:
    """One plane of the mask in its colours, clear where there is background."""
    palette = np.array([(0, 0, 0, 0), *((*colour, 255) for colour in colours(len(result.label_names) - 1))], np.uint8)
    plane = np.take(result.mask, index, axis)[::-1]
    plane = plane[:, ::-1] if axis < 2 else plane  # as `plane_picture` turns it
    picture = Image.fromarray(palette[plane])
    heights = [s for i, s in enumerate(result.spacing) if i != axis]
    scale = _SIDE / max(picture.height * heights[0], picture.width * heights[1])
    size = (max(1, round(picture.width * heights[1] * scale)), max(1, round(picture.height * heights[0] * scale)))
    return picture.resize(size, Image.Resampling.NEAREST)


def _address(picture: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({'quality': 70} if kind == 'JPEG' else {'optimize': False}))
    return f'data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode("ascii")}'


def volumes_html(result: VolumeSegmentationResult) -> str:
    """A table of the classes: colour, name, millilitres, share of all that was found."""
    volumes = result.volumes_ml
    total = sum(volumes.values()) or 1.
    rows = ''.join(
        f'<tr><th scope="row"><i style="background:rgb{colour}"></i>{html.escape(name)}</th><td>{volume:,.2f} ml</td>'
        f'<td>{volume / total:.0%}</td></tr>'
        for (name, volume), colour in zip(volumes.items(), colours(len(volumes))))
    return '<table class="vh-table vh-volumes"><thead><tr><th>Class</th><th>Volume</th><th>Share</th></tr></thead>' \
           f'<tbody>{rows}</tbody></table>'


def _models() -> List[TrainedModel]:
    """Those of one channel: several are several files, which Python and the command line take."""
    return [model for model in trained_models(TASK) if model.in_chans == 1]


def _about(model: TrainedModel) -> str:
    text = f'{html.escape(model.summary)}. ' if model.summary else ''
    if model.tag == 'procedural':
        text += 'It has seen nothing but made volumes of an ellipsoid with tubes through it.'
    return f'<div class="vh-note">{text}</div>'


def build(tab: gr.Tab) -> None:
    """Add the tab's content to the Blocks around it."""
    models = _models()
    if not models:
        gr.HTML(notice(NO_MODELS))
        return
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300, scale=2):
            gr.HTML(f'<div class="vh-status"><b>{RESEARCH_ONLY}</b></div>')
            scan = file_input('Scan', height=140, elem_id='vh-volume-scan')
            status = gr.HTML(notice(_NOTHING_YET), elem_id='vh-volume-status')
            example = gr.Button('Take the example (made, of nobody)', size='sm', elem_id='vh-volume-example')
            model = model_choice(models, _about, 'vh-volume-model')
            with gr.Accordion('Options', open=False):
                channel = gr.Number(None, precision=0, minimum=0, label='Of a 4-D file: which volume, from 0')
                mirror = gr.Checkbox(False, label='Average over mirrored copies (eight times as long)')
            run, stop = run_and_stop('Segment', 'vh-volume')
        with gr.Column(min_width=300, scale=3):
            planes = gr.HTML(elem_id='vh-volume-planes')
            volumes = gr.HTML(elem_id='vh-volume-volumes')
            mesh = gr.Model3D(
                label='Surfaces (drag to turn)', visible='hidden', interactive=False, height=320,
                clear_color=(0.96, 0.96, 0.97, 1.), elem_id='vh-volume-mesh')
            facts = gr.HTML(elem_id='vh-volume-facts')
            files = gr.File(
                file_count='multiple', label='Download', visible=False, interactive=False, elem_id='vh-volume-files')

    # Raw values (preprocess=False): see upload.py. `always_last`: of several quick changes only the last one counts.
    gr.on(
        [scan.change, model.change, run.click],
        segment, [scan, model, channel, mirror], [planes, volumes, facts, files, status, stop],
        preprocess=False, show_progress='hidden', trigger_mode='always_last', api_visibility='private',
    ).then(surfaces, files, mesh, show_progress='hidden', api_visibility='private')
    stop.click(_RUNNING.stop, queue=False, show_progress='hidden', api_visibility='private')

    example.click(lambda: str(EXAMPLE), None, scan, show_progress='hidden', api_visibility='private')
