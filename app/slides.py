"""The Slides tab: a whole-slide image in, its class in each task and where that shows out. Research use only."""
import base64
import html
import io
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import gradio as gr
import numpy as np
from PIL import Image

from vishub.tasks import drawing
from vishub.tasks.base import Progress
from vishub.tasks.slide_analysis.heatmap import paint
from vishub.tasks.slide_analysis.pipeline import NOTICE, SlideAnalysisResult
from vishub.training.logs import duration

from .examples import FOLDER
from .messages import error_sentence, facts_html, failure, notice
from .models import TrainedModel, choose, trained_models
from .parts import example_gallery, model_choice, run_and_stop
from .pipelines import PIPELINES
from .upload import file_input, uploaded
from .work import RunningWork, Stopped, Work

__all__ = ['SLIDES', 'analyse', 'bars_html', 'build', 'viewer_html']

TASK = 'slide_analysis'
NO_MODELS = 'No slide analysis model has trained weights yet, so there is nothing to try here. ' \
            'The Models tab lists the architectures.'
SLIDES = tuple(sorted((FOLDER / 'slides').glob('*.svs')))
UNKNOWN = 'not known'
_WITHOUT = '_no_replay'  # how the tag of the weights to compare with ends
_NOTHING_YET = 'Choose a slide (.svs, pyramidal .tif, …; here up to 40 MB), or take an example.'
_SIDE = 900  # of the pictures that the page gets, in pixels
_RUNNING = RunningWork()

# viewer, bars, patches, facts, files, status, Stop button
Outputs = Tuple[str, str, Any, str, Any, str, Any]


def analyse(
        upload: Optional[dict],
        model: str,
        task: str,
        mpp: float,
        max_regions: int,
        request: Optional[gr.Request] = None,
) -> Iterator[Outputs]:
    """Analyse an upload; yields what the page shall show, the last time with the result or one sentence of error.

    Args:
        upload: Raw value of the file component.
        model: Name of one of `trained_models`.
        task: Task that the slide is known to be of, or `UNKNOWN`.
        mpp: Micrometres a pixel; 0 for what the file says.
        max_regions: Look at so many regions at most.
        request: Given by Gradio; tells whose Stop button ends this work.
    """
    if not upload:
        yield _page(notice(_NOTHING_YET))
        return
    path = name = None
    try:
        path, name = uploaded(upload) or ('', '')
        models = trained_models(TASK)
        chosen = choose(model, models)
        other = next((row for row in models if row.name == chosen.name + _WITHOUT), None)
        options: Dict[str, Any] = {
            'task': None if task == UNKNOWN else task, 'mpp': float(mpp) or None, 'max_regions': int(max_regions)}
        work = Work(lambda progress: _run(chosen, other, path, options, progress))
        begin = time.monotonic()

        def doing(done: int, total: int) -> str:
            if not total:
                return f'Loading {chosen.name} …'
            left = (time.monotonic() - begin) / done * (total - done) if done else None
            return f'Region {done} of {total} of {name}' + ('' if left is None else f', {duration(left)} left') + ' …'

        for status, stop in _RUNNING.watch(work, request, doing):
            yield (*(gr.skip() for _ in range(5)), status, stop)
        result, compared = work.result()
    except Stopped:
        yield _page(notice('Stopped.'))
        return
    except Exception as error:
        yield _page(failure(error_sentence(error, 'analysing the slide', path, name)))
        return
    with tempfile.TemporaryDirectory() as folder:  # Gradio has its own copies when this generator goes on
        yield _shown(result, compared, chosen, name, Path(folder))


def _run(
        chosen: TrainedModel, other: Optional[TrainedModel], path: str, options: Mapping[str, Any], progress: Progress,
) -> Tuple[SlideAnalysisResult, Optional[SlideAnalysisResult]]:
    """The result, and that of the weights without replay on the same features."""
    with tempfile.TemporaryDirectory() as cache:
        pipeline = PIPELINES.get(TASK, chosen.source)
        result = pipeline(path, cache=cache, progress=progress, **options)
        if other is None:
            return result, None
        return result, PIPELINES.get(TASK, other.source)(path, cache=cache, **options)


def _shown(
        result: SlideAnalysisResult, compared: Optional[SlideAnalysisResult], chosen: TrainedModel, name: str,
        folder: Path,
) -> Outputs:
    files = []
    for suffix in ('.overlay.png', '.geojson', '.json'):
        files.append(str(result.save(folder / f'{Path(name).stem}{suffix}')))
    seconds = sum(result.seconds.values())
    facts = {
        'Model': chosen.name,
        'Slide': f'{result.width:,} × {result.height:,} px, {result.mpp:g} µm',
        'Regions': f'{len(result.coords)}, tissue {result.tissue.mean():.0%}',
        'Time': f'{seconds:.1f} s, {result.seconds["encode"] / max(seconds, 1e-9):.0%} of it the encoder',
    }
    among = result.by_task[result.task] if result.task else result.probabilities
    given = f'of {result.task}' if result.task else f'among all {len(result.probabilities)} classes'
    sentence = f'{name}: {result.predicted}, {among[result.predicted]:.0%} {given}. {NOTICE}'
    patches = [
        (Image.fromarray(patch.picture).resize((96, 96), Image.Resampling.NEAREST), f'{patch.score:.1%}')
        for patch in result.top_patches]
    return _page(
        notice(' '.join([sentence, *result.warnings])), viewer_html(result), bars_html(result, compared),
        gr.Gallery(patches, visible=bool(patches)), facts_html(facts), gr.File(files, visible=True))


def _page(
        status: str, viewer: str = '', bars: str = '', patches: Any = None, facts: str = '', files: Any = None,
) -> Outputs:
    """The page at rest: what is not given is emptied."""
    hidden = gr.Gallery([], visible=False) if patches is None else patches
    return viewer, bars, hidden, facts, files or gr.File(None, visible=False), status, gr.Button(interactive=False)


# A choice shows one layer; the slider goes over all of them.
_SHOW = "this.closest('.vh-slide').querySelectorAll('img[data-layer]').forEach(" \
        "i => i.style.display = i.dataset.layer == this.value ? 'block' : 'none')"
_FADE = "this.closest('.vh-slide').querySelectorAll('img[data-layer]').forEach(" \
        'i => i.style.opacity = this.value / 100)'


def viewer_html(result: SlideAnalysisResult) -> str:
    """The overview with three layers over it (heat of patches, of regions, tissue) and a slider for their opacity."""
    overview = drawing.fit(Image.fromarray(result.overview), _SIDE, _SIDE)
    layers = {
        'patches': ('Heat of patches', _heat_layer(result, 'patch', overview.size)),
        'regions': ('Heat of regions', _heat_layer(result, 'region', overview.size)),
        'tissue': ('Tissue', _mask_layer(result.tissue, overview.size)),
    }
    style = 'position:absolute;inset:0;width:100%;height:100%;opacity:0.6'
    pictures = ''.join(
        f'<img data-layer="{key}" alt="{title}" style="{style};display:{"block" if not place else "none"}" '
        f'src="{_address(picture, "PNG")}">' for place, (key, (title, picture)) in enumerate(layers.items()))
    choices = ''.join(
        f'<label style="margin-right:14px"><input type="radio" name="vh-slide-layer" value="{key}" '
        f'{"checked " if not place else ""}onchange="{_SHOW}"> {title}</label>'
        for place, (key, (title, _)) in enumerate(layers.items()))
    return (
        '<div class="vh-slide"><div style="position:relative">'
        f'<img alt="Overview of the slide" style="display:block;width:100%" src="{_address(overview, "JPEG")}">'
        f'{pictures}</div><div class="vh-note" style="margin-top:8px">{choices}</div>'
        '<label class="vh-note" style="display:flex;gap:10px;align-items:center;max-width:320px">Opacity '
        '<input type="range" min="0" max="100" value="60" aria-label="Opacity of the layer" style="flex:1" '
        f'oninput="{_FADE}"></label></div>')


def _heat_layer(result: SlideAnalysisResult, level: str, size: Tuple[int, int]) -> Image.Image:
    """Colours alone, clear where there is no tissue."""
    place = (result.coords / result.downsample, result.region_size / result.downsample)
    inside = result.patch_tissue > 0
    heat = result.heat(level)
    colours = paint(result.overview, *place, heat, inside, 1.)
    shape = (*result.overview.shape[:2], 3)
    clear = np.asarray(paint(np.zeros(shape, np.uint8), *place, np.ones_like(heat), inside, 1.)).any(2)
    # the coldest are painted at a third: as one colour of its own, so that the slider does the rest
    picture = Image.fromarray(np.dstack([np.asarray(colours), 255 * clear.astype(np.uint8)]), 'RGBA')
    return picture.resize(size, Image.Resampling.NEAREST)


def _mask_layer(mask: np.ndarray, size: Tuple[int, int]) -> Image.Image:
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[mask] = (*drawing.ACCENT, 255)
    return Image.fromarray(layer, 'RGBA').resize(size, Image.Resampling.NEAREST)


def _address(picture: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode("ascii")}'


def bars_html(result: SlideAnalysisResult, compared: Optional[SlideAnalysisResult]) -> str:
    """Bars of all classes by task, in the order in which they were learnt; beside them those without replay."""
    columns = [('With replay of earlier slides' if compared else 'Among all classes', result)]
    if compared is not None:
        columns.append(('What if it had been fine-tuned without', compared))
    parts = []
    for title, column in columns:
        best = html.escape(column.predicted)
        rows = [f'<h4 style="margin:0 0 6px">{title}: <span>{best}</span></h4>']
        for task, values in column.by_task.items():
            rows.append(f'<div class="vh-note" style="margin-top:6px">{html.escape(task)}</div>')
            rows += [
                _bar(label, column.probabilities[label], share, label == column.predicted)
                for label, share in values.items()]
        parts.append(f'<div style="flex:1;min-width:220px">{"".join(rows)}</div>')
    note = 'Bars: among the classes of all tasks. In brackets: if the task were known. The tasks were learnt from ' \
           'top to bottom.'
    return f'<div style="display:flex;flex-wrap:wrap;gap:24px">{"".join(parts)}</div>' \
           f'<div class="vh-note" style="margin-top:8px">{note}</div>'


def _bar(label: str, share: float, masked: float, best: bool) -> str:
    colour = 'var(--color-accent)' if best else 'var(--neutral-400)'
    row = 'display:grid;grid-template-columns:76px 1fr 92px;gap:8px;align-items:center;font-size:var(--text-sm)'
    track = 'background:var(--border-color-primary);border-radius:4px;height:10px'
    filled = f'display:block;height:10px;border-radius:4px;width:{100 * share:.1f}%;background:{colour}'
    return (
        f'<div style="{row}"><span style="font-weight:{600 if best else 400}">{html.escape(label)}</span>'
        f'<span style="{track}"><span style="{filled}"></span></span>'
        f'<span style="font-variant-numeric:tabular-nums">{share:.0%} ({masked:.0%})</span></div>')


def _about(model: TrainedModel) -> str:
    text = f'{html.escape(model.summary)}. ' if model.summary else ''
    if 'procedural' in model.tag:
        text += 'It has seen nothing but drawn lesions in four invented organs, learnt one after the other. '
    return f'<div class="vh-note">{text}<b>{NOTICE}</b></div>'


def build(tab: gr.Tab) -> None:
    """Add the tab's content to the Blocks around it."""
    models = [row for row in trained_models(TASK) if not row.name.endswith(_WITHOUT)]
    if not models:
        gr.HTML(notice(NO_MODELS))
        return
    by_name = {model.name: model for model in models}
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            slide = file_input('Slide', height=140, elem_id='vh-slides-file')
            status = gr.HTML(notice(_NOTHING_YET), elem_id='vh-slides-status')
            gallery: List[Tuple[str, str]] = [(str(path.with_suffix('.jpg')), path.stem) for path in SLIDES]
            examples = example_gallery(gallery, 'vh-slides-examples')
            model = model_choice(models, _about, 'vh-slides-model')
            task = gr.Dropdown(
                [UNKNOWN, *tasks_of(models[0])], value=UNKNOWN, label='Task (tumour type), if it is known',
                elem_id='vh-slides-task')
            with gr.Accordion('Options', open=False):
                mpp = gr.Number(0, minimum=0, label='Micrometres a pixel; 0 for what the file says')
                most = gr.Slider(1, 400, value=200, step=1, label='Regions at most')
            run, stop = run_and_stop('Analyse', 'vh-slides')
        with gr.Column(min_width=300, scale=2):
            viewer = gr.HTML(elem_id='vh-slides-viewer')
            bars = gr.HTML(elem_id='vh-slides-bars')
            patches = gr.Gallery(
                label='Patches that count most, with their share of the heat', columns=3, height='auto',
                allow_preview=False, buttons=[], interactive=False, visible=False, elem_id='vh-slides-patches',
                elem_classes='vh-thumbnails')
            facts = gr.HTML(elem_id='vh-slides-facts')
            files = gr.File(label='Download (the .geojson opens in QuPath)', visible=False, interactive=False,
                            elem_id='vh-slides-files')

    # Raw values (preprocess=False): see upload.py. `always_last`: of several quick changes only the last one counts.
    gr.on(
        [slide.change, model.change, task.change, run.click],
        analyse, [slide, model, task, mpp, most], [viewer, bars, patches, facts, files, status, stop],
        preprocess=False, show_progress='hidden', trigger_mode='always_last', api_visibility='private',
    )
    stop.click(_RUNNING.stop, queue=False, show_progress='hidden', api_visibility='private')

    def take_example(event: gr.SelectData) -> str:
        return str(SLIDES[event.index])

    def change_tasks(name: str) -> Any:
        return gr.Dropdown([UNKNOWN, *tasks_of(by_name[name])], value=UNKNOWN)

    examples.select(take_example, None, slide, show_progress='hidden', api_visibility='private')
    model.change(change_tasks, model, task, show_progress='hidden', api_visibility='private')


def tasks_of(model: TrainedModel) -> List[str]:
    """The tasks that weights know, by their registered or stored configuration."""
    import json

    from vishub.hub.find import weights_folder
    from vishub.tasks.slide_analysis.setting import SlideSetting

    folder = weights_folder(model.source.removeprefix('local-dir:'))
    if folder is None:
        return []
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    return list(SlideSetting.of(config['pretrained_cfg'], config['num_classes']).tasks)
