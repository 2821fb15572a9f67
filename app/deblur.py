"""The Deblur tab: a shaken photograph in, a sharper one out, and the blur that the model believes in.

Sharp photographs can be shaken here first, more or less: then the truth is known, and so is what was gained.
"""
import dataclasses
import html
import tempfile
from pathlib import Path
from typing import Any, Iterator, List, Optional, Tuple

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw

from vishub.tasks import drawing
from vishub.tasks.base import Progress
from vishub.tasks.deblurring.photo import Photo, read_photo
from vishub.tasks.deblurring.pipeline import DeblurResult
from vishub.tasks.deblurring.shake import blur, camera_shake

from .examples import EXAMPLES
from .messages import error_sentence, facts_html, failure, notice
from .models import TrainedModel, choose, trained_models
from .parts import example_gallery, model_choice, run_and_stop
from .pipelines import PIPELINES
from .upload import picture_input, uploaded
from .work import RunningWork, Stopped, Work

__all__ = ['PHOTOS', 'build', 'deblur', 'shaken']

TASK = 'deblurring'
NO_MODELS = 'No deblurring model has trained weights yet, so there is nothing to try here. ' \
            'The Models tab lists the architectures.'
PHOTOS = tuple(example for example in EXAMPLES if example.path.suffix == '.jpg')
MOST_SHAKE = 25  # pixels
_SHOWN = (1400, 1000)  # width, height that pictures are scaled down to fit, for the page alone
_NOTHING_YET = 'Choose a photograph, paste one, or take an example.'
_RUNNING = RunningWork()

# before and after, kernels, facts, download, status, Stop button
Outputs = Tuple[Any, Any, str, Any, str, Any]


@dataclasses.dataclass(frozen=True)
class Done:
    """What the work gives: the result, the true kernel and the sharp photograph where it was shaken here."""
    result: DeblurResult
    kernel: Optional[np.ndarray] = None
    sharp: Optional[np.ndarray] = None


def shaken(photo: Photo, length: float, seed: int) -> Tuple[Photo, np.ndarray]:
    """The photograph as if the camera had moved over `length` pixels: the same file with 8-bit colours, and the kernel.

    The same `seed` gives a path of the same shape at every length.
    """
    generator = np.random.default_rng(seed)
    kernel = camera_shake(generator, length)
    colours = np.round(photo.rgb(photo.pixels) * 255).astype(np.uint8)
    moved = blur(colours, kernel, 0.005, generator)
    pixels = photo.pixels.copy()
    photo.stored(moved.astype(np.float32) / 255, pixels)
    return dataclasses.replace(photo, pixels=pixels), kernel


def deblur(
        upload: Optional[dict],
        model: str,
        strength: float,
        shake: float,
        seed: float,
        request: Optional[gr.Request] = None,
) -> Iterator[Outputs]:
    """Sharpen an upload; yields what the page shall show, the last time with the result or one sentence of error.

    Args:
        upload: Raw value of the picture component.
        model: Name of one of `trained_models`.
        strength: Share of the change that is applied, 0..1.
        shake: Length in pixels of a camera shake that is added first; 0 for none.
        seed: Which shake.
        request: Given by Gradio; tells whose Stop button ends this work.
    """
    if not upload:
        yield _page(notice(_NOTHING_YET))
        return
    path = name = None
    try:
        path, name = uploaded(upload)
        chosen = choose(model, trained_models(TASK))
        work = Work(lambda progress: _run(chosen, path, float(strength), float(shake), int(seed or 0), progress))

        def doing(done: int, total: int) -> str:
            return f'Sharpening {name}, tile {min(done + 1, total)} of {total} …' if total \
                else f'Loading {chosen.name} …'

        for status, stop in _RUNNING.watch(work, request, doing):
            yield (*(gr.skip() for _ in range(4)), status, stop)
        finished = work.result()
    except Stopped:
        yield _page(notice('Stopped.'))
        return
    except Exception as error:
        yield _page(failure(error_sentence(error, 'sharpening the picture', path, name)))
        return
    with tempfile.TemporaryDirectory() as folder:  # Gradio has its own copy when this generator goes on
        yield _shown(finished, chosen, name, Path(folder))


def _run(
        chosen: TrainedModel, path: str, strength: float, shake: float, seed: int, progress: Progress) -> Done:
    pipeline = PIPELINES.get(TASK, chosen.source)
    if shake <= 0:
        return Done(pipeline(path, strength=strength, progress=progress))
    photo = read_photo(path)
    moved, kernel = shaken(photo, shake, seed)
    return Done(pipeline.sharpen(moved, strength=strength, progress=progress), kernel, photo.pixels)


def _page(
        status: str, pictures: Any = None, kernels: Any = None, facts: str = '', download: Any = None) -> Outputs:
    """The page at rest: what is not given is emptied."""
    download = gr.DownloadButton(interactive=False) if download is None else download
    return pictures, kernels, facts, download, status, gr.Button(interactive=False)


def _shown(done: Done, chosen: TrainedModel, name: str, folder: Path) -> Outputs:
    result = done.result
    file = result.save(folder / f'{Path(name).stem}.sharp{result.photo.suffix}')
    before, after = (
        image if image.width <= _SHOWN[0] and image.height <= _SHOWN[1] else drawing.fit(image, *_SHOWN)
        for image in (result.original.convert('RGB'), result.image.convert('RGB')))
    height, width = result.pixels.shape[:2]
    facts = {
        'Model': chosen.name,
        'Parameters': f'{result.num_params / 1e6:.2f} M',
        'Time': f'{result.latency_ms / 1000:.1f} s',
        'Pixels': f'{width} × {height}',
    }
    sentences = [f'{name}: {result.summary()[0]}.', *result.warnings]
    if done.sharp is not None:
        shaken_psnr, sharpened_psnr = (
            _psnr(pixels, done.sharp, result.photo.white) for pixels in (result.photo.pixels, result.pixels))
        facts['Shaken, against the true one'] = f'{shaken_psnr:.2f} dB'
        facts['Sharpened, against the true one'] = f'{sharpened_psnr:.2f} dB'
        sentences.append(f'The shake was made here, so the truth is known: {sharpened_psnr - shaken_psnr:+.2f} dB.')
    return _page(
        notice(' '.join(sentences)), (before, after), _kernels(done), facts_html(facts),
        gr.DownloadButton(value=str(file), interactive=True))


def _psnr(pixels: np.ndarray, sharp: np.ndarray, white: int) -> float:
    colours = 3 if sharp.shape[-1] >= 3 else 1
    error = np.square((pixels[..., :colours].astype(np.float32) - sharp[..., :colours]) / white).mean()
    return float(-10 * np.log10(max(error, 1e-12)))


def _kernels(done: Done) -> Image.Image:
    """The estimated blur and the filters; the true kernel beside the estimate where it is known."""
    picture = done.result.kernel_picture()
    side, head = picture.width // 2, 64  # the component's label lies over the upper edge
    canvas = Image.new('RGB', (picture.width, picture.height + head), drawing.PAPER)
    canvas.paste(picture, (0, head))
    draw = ImageDraw.Draw(canvas)
    if done.kernel is None:
        draw.text((side // 2, head - 26), 'estimated blur', fill=drawing.INK, font=drawing.font(16))
        return canvas
    size, own = len(done.result.blur), len(done.kernel)
    whole = np.zeros((max(size, own),) * 2, np.float32)
    start = (len(whole) - own) // 2
    whole[start:start + own, start:start + own] = done.kernel
    true = Image.fromarray(drawing.heat_colours(np.sqrt(whole / whole.max())))
    true = true.resize((side - 4, side - 4), Image.Resampling.NEAREST)
    found = picture.crop((side // 2, 0, side // 2 + side, side)).resize((side - 4, side - 4))
    canvas.paste(drawing.PAPER, (0, head, picture.width, head + side))
    for left, title, one in ((0, 'true blur', true), (side + 4, 'estimated blur', found)):
        draw.text((left, head - 26), title, fill=drawing.INK, font=drawing.font(16))
        canvas.paste(one, (left, head))
    return canvas


def _about(model: TrainedModel) -> str:
    return f'<div class="vh-note">{html.escape(model.summary)}</div>'


def build(tab: gr.Tab) -> None:
    """Add the tab's content to the Blocks around it."""
    models = trained_models(TASK)
    if not models:
        gr.HTML(notice(NO_MODELS))
        return
    gallery: List[Tuple[str, str]] = [(str(photo.path), photo.caption) for photo in PHOTOS]
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300, scale=2):
            picture = picture_input('Photograph', height=260, elem_id='vh-deblur-picture')
            status = gr.HTML(notice(_NOTHING_YET), elem_id='vh-deblur-status')
            examples = example_gallery(gallery, 'vh-deblur-examples', 'Or take a sharp one, which is shaken first')
            shake = gr.Slider(
                0, MOST_SHAKE, value=0, step=1, label='Shake it first', elem_id='vh-deblur-shake',
                info='Length of a camera shake in pixels, added before; 0 takes the photograph as it is.')
            again = gr.Button('Another shake', size='sm')
            seed = gr.Number(0, precision=0, visible=False)
            model = model_choice(models, _about, 'vh-deblur-model')
            with gr.Accordion('Options', open=False):
                strength = gr.Slider(0, 1, value=1, step=0.05, label='How much of the change is applied')
            run, stop = run_and_stop('Deblur', 'vh-deblur')
        with gr.Column(min_width=300, scale=3):
            pictures = gr.ImageSlider(
                label='Before and after: drag the line', interactive=False, type='pil', format='png',
                elem_id='vh-deblur-slider')
            download = gr.DownloadButton(
                'Download in the original format', interactive=False, elem_id='vh-deblur-download')
            kernels = gr.Image(
                label='Blur, and filters of the model',
                interactive=False, format='png', buttons=['download', 'fullscreen'], elem_id='vh-deblur-kernels')
            facts = gr.HTML(elem_id='vh-deblur-facts')

    # Raw values (preprocess=False): see upload.py. `always_last`: of several quick changes only the last one counts.
    gr.on(
        [picture.change, model.change, run.click, shake.release, seed.change],
        deblur, [picture, model, strength, shake, seed], [pictures, kernels, facts, download, status, stop],
        preprocess=False, show_progress='hidden', trigger_mode='always_last', api_visibility='private',
    )
    stop.click(_RUNNING.stop, queue=False, show_progress='hidden', api_visibility='private')
    again.click(lambda number: (number or 0) + 1, seed, seed, show_progress='hidden', api_visibility='private')

    def take_example(length: float, event: gr.SelectData) -> Tuple[str, float]:
        return str(PHOTOS[event.index].path), length or 11  # they are sharp

    examples.select(take_example, shake, [picture, shake], show_progress='hidden', api_visibility='private')
