"""The Tokens tab: a vision transformer with fewer tokens inside, what is left of the picture, and what that costs.

The model of the pipeline is shared between requests, so a copy of it is reduced and forgotten afterwards.
"""
import base64
import copy
import html
import io
import statistics
import time
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import nn

from vishub import InputError, catalog, tokens
from vishub.tasks.base import Progress
from vishub.tasks.classification.pipeline import ClassificationPipeline, ClassificationResult
from vishub.tokens.method import find_method
from vishub.tokens.tracing import Trace

from .classify import examples_for
from .messages import error_sentence, failure, notice
from .models import TrainedModel, choose, trained_models
from .parts import example_gallery, model_choice, run_and_stop
from .pipelines import PIPELINES
from .upload import picture_input, uploaded
from .work import RunningWork, Stopped, Work

__all__ = [
    'METHODS', 'NO_MODELS', 'Comparison', 'Step', 'build', 'compare', 'method_choices', 'reduce_tokens', 'reducible',
]

TASK = 'classification'
FAMILIES = ('vit', 'nvit')  # those of the catalogue that vishub.tokens can reduce
NO_MODELS = 'No vision transformer has trained weights yet, so there are no tokens to reduce here. ' \
            'The Models tab lists the architectures.'
_RUNNING = RunningWork()
_NOTHING_YET = 'Choose a picture, paste one, or take an example.'
_EMPTY = '<div class="vh-empty vh-note">What is left of the picture, block by block, appears here; below it the ' \
         'prediction and the cost of the full model beside those with fewer tokens.</div>'
_SHOWN_CLASSES = 5
_RUNS, _FEWEST_RUNS, _SECONDS = 21, 5, 4.0  # pairs of runs at most and at least, and when to be content with fewer
_PICTURE_SIDE = 480  # longer side of the pictures of patches, about
_HATCH = (112, 128, 144)

# name -> title, explanation. Methods that others register are listed with their docstring's first line.
METHODS: Dict[str, Tuple[str, str]] = {
    'tome': ('ToMe', 'In every block the tokens that are most alike merge in pairs. Needs no training.'),
    'token_transforming': (
        'Token Transforming', 'Each token that goes is shared out among several that stay. Needs no training.'),
    'zero_tprune': (
        'Zero-TPrune', 'Tokens that matter little in the attention graph are dropped, and then those that resemble '
                       'others. Needs no training.'),
    'pyra': ('PYRA', 'ToMe with small gates that are fine-tuned for the task. This model was not fine-tuned with it, '
                     'so expect what ToMe gives.'),
    'class_attention': ('Class attention', 'The tokens that the class token attends to most stay, as in EViT.'),
    'uniform': ('Uniform', 'Tokens at equal distances stay, whatever the picture shows. A baseline.'),
    'random': ('Random', 'Tokens drawn by lot stay. A baseline, and different each time.'),
}

# blocks, classes, numbers, status, Stop button
Outputs = Tuple[Any, Any, Any, str, Any]


@dataclass(frozen=True)
class Step:
    """What the tokens behind one block show.

    Attributes:
        caption: Where in the model, and how many tokens are left.
        image: RGB picture of what each token stands for.
    """
    caption: str
    image: Image.Image


@dataclass(frozen=True)
class Comparison:
    """A model and the same model with fewer tokens, on one picture.

    Attributes:
        before, after: What the full and the reduced model say; all classes.
        macs: Multiply-accumulates an image of the two.
        overhead: Multiply-accumulates of deciding which tokens merge or go, not in `macs`.
        latency_ms: Median milliseconds of one picture, of the two.
        runs: Interleaved pairs of runs in these medians.
        device: What they ran on, e.g. `cpu`.
        patches: Patch tokens behind the last block, of the two.
        steps: The picture as the model gets it, then one step a reducing block.
        merges: The method merges tokens; otherwise it drops them.
    """
    before: ClassificationResult
    after: ClassificationResult
    macs: Tuple[int, int]
    overhead: int
    latency_ms: Tuple[float, float]
    runs: int
    device: str
    patches: Tuple[int, int]
    steps: Tuple[Step, ...]
    merges: bool


def reducible() -> List[TrainedModel]:
    """The trained models that are vision transformers."""
    families = {row.name: row.family for row in catalog.architectures(TASK)}
    return [model for model in trained_models(TASK) if families[model.name.partition('.')[0]] in FAMILIES]


def method_choices() -> List[Tuple[str, str]]:
    """(title, name) of every registered method, vishub's own first."""
    registered = tokens.methods()
    names = [name for name in METHODS if name in registered]
    names += [name for name in registered if name not in METHODS]
    return [(METHODS[name][0] if name in METHODS else name, name) for name in names]


def _explanation(method: str) -> str:
    if method in METHODS:
        text = METHODS[method][1]
    else:
        text = (find_method(method).__doc__ or '').strip().partition('\n')[0]
    return f'<div class="vh-note">{html.escape(text)}</div>'


def compare(
        pipe: ClassificationPipeline,
        path: str,
        method: str,
        budget: float,
        progress: Optional[Progress] = None,
) -> Comparison:
    """Run a model in full and with reduced tokens on one picture.

    Args:
        pipe: The full model's; it is not changed.
        path: The picture.
        method: Name of one of `vishub.tokens.methods()`.
        budget: Share of the full model's multiply-accumulates, in (0, 1].
        progress: Called with (steps done, steps in all).

    Raises:
        InputError: If the picture cannot be used, or the method cannot meet the budget on this model.
    """
    report = progress or (lambda done, total: None)
    report(0, _RUNS + 2)
    before = pipe(path, top_k=pipe.num_classes)
    report(1, _RUNS + 2)
    if method == 'pyra' and budget >= 1:  # its own sentence speaks to programmers
        raise InputError('PYRA needs tokens to merge: choose a budget below 1')
    model = tokens.apply(copy.deepcopy(pipe.model), method, macs=budget)
    reduced = ClassificationPipeline(model, pipe.device)
    with tokens.trace(model) as traces:
        after = reduced(before.image, top_k=pipe.num_classes)
    trace = traces[0]
    batch, box = pipe.prepare(before.image)
    view = before.image.crop(tuple(round(edge) for edge in box))
    if pipe.input_size[0] == 1:
        view = view.convert('L')
    steps = _steps(view.convert('RGB'), trace)
    report(2, _RUNS + 2)
    latency, runs = _latencies(
        (pipe.model, model), batch[None].to(pipe.device), lambda done: report(2 + done, _RUNS + 2))
    full, less = tokens.macs(pipe.model, pipe.input_size), tokens.macs(model, pipe.input_size)
    return Comparison(
        before=before,
        after=after,
        macs=(full.total, less.total),
        overhead=less.overhead,
        latency_ms=latency,
        runs=runs,
        device=pipe.device.type,
        patches=(trace.start - trace.prefix, trace.counts[-1][1] - trace.prefix),
        steps=steps,
        merges=trace.merges,
    )


def _latencies(
        models: Tuple[nn.Module, nn.Module],
        batch: torch.Tensor,
        report: Any,
) -> Tuple[Tuple[float, float], int]:
    """Median milliseconds of two models that have run before, and how many pairs of runs that took."""
    took: Tuple[List[float], List[float]] = ([], [])
    begun = time.perf_counter()
    for run in range(_RUNS):
        if run >= _FEWEST_RUNS and time.perf_counter() - begun > _SECONDS:
            break
        # In turns, and each first every other time: whatever else the machine does hits both alike.
        for which in (0, 1) if run % 2 == 0 else (1, 0):
            start = time.perf_counter()
            with torch.inference_mode():
                models[which](batch).cpu()  # waits for an accelerator to finish
            took[which].append((time.perf_counter() - start) * 1000)
        report(run + 1)
    return (statistics.median(took[0]), statistics.median(took[1])), len(took[0])


def _steps(view: Image.Image, trace: Trace) -> Tuple[Step, ...]:
    """`view`: RGB, what the model saw at any resolution."""
    rows, columns = trace.grid
    scale = _PICTURE_SIDE / max(view.size)
    # Whole pixels for every patch. A picture of few pixels is enlarged as such: they are all that the model gets.
    size = (max(1, round(view.width * scale / columns)) * columns, max(1, round(view.height * scale / rows)) * rows)
    view = view.resize(size, Image.Resampling.NEAREST if scale > 4 else Image.Resampling.LANCZOS)
    patches, depth = trace.start - trace.prefix, len(trace.counts)
    steps = [Step(f'At the input: {patches} patches, a token each', view)]
    for layer in trace.steps:
        left = trace.counts[layer][1] - trace.prefix
        picture = _hatched(tokens.visualize(view, trace, layer), trace, layer)
        steps.append(Step(f'Behind block {layer + 1} of {depth}: {left} of {patches} patch tokens left', picture))
    return tuple(steps)


def _hatched(picture: Image.Image, trace: Trace, layer: int) -> Image.Image:
    """`tokens.visualize` dims what was dropped; on a black ground only lines show it."""
    rows, columns = trace.grid
    gone = trace.assignment(layer)[0, trace.prefix:].reshape(rows, columns).cpu().numpy() < 0
    pixels = np.array(picture)  # H, W, 3
    height, width = pixels.shape[:2]
    gone = gone.repeat(height // rows, axis=0).repeat(width // columns, axis=1)  # H, W
    lines = np.add.outer(np.arange(height), np.arange(width)) % 8 < 1
    pixels[gone & lines] = _HATCH
    return Image.fromarray(pixels)


def reduce_tokens(
        upload: Optional[dict],
        model: str,
        method: str,
        budget: float,
        request: Optional[gr.Request] = None,
) -> Iterator[Outputs]:
    """Compare on an upload; yields what the page shall show, the last time with the result or one sentence of error.

    Args:
        upload: Raw value of the picture component.
        model: Name of one of `reducible`.
        method: Name of one of `vishub.tokens.methods()`.
        budget: Share of the multiply-accumulates.
        request: Given by Gradio; tells whose Stop button ends this work.
    """
    if not upload:
        yield _page(notice(_NOTHING_YET))
        return
    path = name = None
    try:
        path, name = uploaded(upload)
        chosen = choose(model, reducible())
        work = Work(lambda progress: compare(PIPELINES.get(TASK, chosen.source), path, method, budget, progress))

        def doing(done: int, total: int) -> str:
            if not total:
                return f'Loading {chosen.name} …'
            return f'Looking at {name} …' if done < 2 else 'Measuring how long both take …'

        for status, stop in _RUNNING.watch(work, request, doing):
            yield gr.skip(), gr.skip(), gr.skip(), status, stop
        result = work.result()
    except Stopped:
        yield _page(notice('Stopped.'))
        return
    except Exception as error:
        yield _page(failure(error_sentence(error, 'reducing the tokens', path, name)))
        return
    yield _page(notice(_verdict(result, name)), _blocks_html(result), _classes_html(result), _numbers_html(result))


def _page(status: str, blocks: str = _EMPTY, classes: str = '', numbers: str = '') -> Outputs:
    """The page at rest: what is not given is emptied."""
    return blocks, classes, numbers, status, gr.Button(interactive=False)


def _verdict(result: Comparison, name: str) -> str:
    before, after = result.before.predictions[0], result.after.predictions[0]
    share = result.macs[1] / result.macs[0]
    if before.label == after.label:
        said = f'{before.label} as before, {before.probability:.1%} in full and {after.probability:.1%} now'
    else:
        said = f'the answer changes from {before.label} ({before.probability:.1%}) to ' \
               f'{after.label} ({after.probability:.1%})'
    return ' '.join([f'{name} at {share:.0%} of the MACs: {said}.', *result.before.warnings])


# The pictures are all in the page: moving the slider asks nobody.
_SHOW_STEP = "this.parentNode.querySelectorAll('figure').forEach((step, i) => step.hidden = i != this.value)"


def _blocks_html(result: Comparison) -> str:
    last = len(result.steps) - 1
    figures = ''.join(
        f'<figure{"" if i == last else " hidden"}><img src="{_data_address(step.image)}" '
        f'alt="{html.escape(step.caption)}" width="{step.image.width}" height="{step.image.height}">'
        f'<figcaption>{html.escape(step.caption)}</figcaption></figure>'
        for i, step in enumerate(result.steps)
    )
    if last == 0:
        return f'<div class="vh-steps">{figures}<p class="vh-note">At this budget every token stays.</p></div>'
    slider = f'<input type="range" min="0" max="{last}" step="1" value="{last}" ' \
             f'aria-label="Reducing block" oninput="{_SHOW_STEP}">'
    ends = '<div class="vh-ends"><span>input</span><span>last reducing block</span></div>'
    return f'<div class="vh-steps">{figures}{slider}{ends}{_legend(result.merges)}</div>'


def _legend(merges: bool) -> str:
    entries = [('alone', 'as in the picture: a token of its own')]
    if merges:
        entries.append(('merged', 'one colour inside white lines, also in several places: patches that share a token'))
    else:
        entries.append(('gone', 'dark and hatched: dropped, no token has it any more'))
    items = ''.join(f'<li><i class="vh-{kind}"></i><span>{text}</span></li>' for kind, text in entries)
    return f'<ul class="vh-legend vh-note">{items}</ul>'


def _data_address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, 'WEBP', quality=88)
    return f'data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}'


def _classes_html(result: Comparison) -> str:
    before = {p.index: p.probability for p in result.before.predictions}
    after = {p.index: p.probability for p in result.after.predictions}
    labels = {p.index: p.label for p in result.before.predictions}
    # The likeliest of either, in the order of the full model.
    shown = {p.index for p in result.before.predictions[:_SHOWN_CLASSES] + result.after.predictions[:1]}
    rows = [
        [html.escape(labels[index]), _bar(before[index], 'vh-full'), _bar(after[index], 'vh-less')]
        for index in before if index in shown
    ]
    return _table('Prediction', ['class', 'full model', 'fewer tokens'], rows, 'vh-classes')


def _bar(share: float, kind: str) -> str:
    number = '&lt;0.1%' if 0 < share < 5e-4 else f'{share:.1%}'
    return f'<div class="vh-bar {kind}"><i style="width:{share:.2%}"></i></div>{number}'


def _numbers_html(result: Comparison) -> str:
    full, less = result.latency_ms
    speed = f'{full / less:.2f}× faster' if full >= less else f'{less / full:.2f}× slower'
    rows = [
        ['MACs', _count(result.macs[0]), _count(result.macs[1]), _change(*result.macs)],
        ['Latency', f'{full:.1f} ms', f'{less:.1f} ms', speed],
        ['Patch tokens at the end', *map(str, result.patches), _change(*result.patches)],
    ]
    deciding = f' Deciding which tokens to spare takes {_count(result.overhead)} more.' if result.overhead else ''
    note = f'MACs: multiply-accumulates a picture.{deciding} Latency: median of {result.runs} runs of each model in ' \
           f'turns, one picture at a time, on {result.device}, deciding included.'
    if less > full and result.macs[1] < result.macs[0]:
        note += ' Here deciding takes longer than it saves, as in small models on single pictures: it is many small ' \
                'steps, whatever the size of the model.'
    return _table('Cost', ['', 'full model', 'fewer tokens', 'change'], rows, 'vh-costs') \
        + f'<p class="vh-note">{html.escape(note)}</p>'


def _change(full: int, less: int) -> str:
    return f'{less / full - 1:+.0%}'.replace('-', '\u2212') if less != full else 'the same'


def _count(macs: int) -> str:
    for unit, name in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if macs >= unit:
            return f'{macs / unit:.3g} {name}' if macs < 1000 * unit else f'{macs / unit:.0f} {name}'
    return str(macs)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """Cells are HTML already."""
    head = ''.join(f'<th scope="col">{text}</th>' for text in heads)
    body = ''.join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows)
    return f'<table class="vh-table {kind}"><caption>{title}</caption><thead><tr>{head}</tr></thead>' \
           f'<tbody>{body}</tbody></table>'


def _about(model: TrainedModel) -> str:
    text = f'{model.summary}.' if model.summary else 'Weights of your own: the catalogue has no figures of them.'
    return f'<div class="vh-note">{html.escape(text)}</div>'


def build(tab: gr.Tab) -> None:
    """Add the tab's content to the Blocks around it."""
    models = reducible()
    if not models:
        gr.HTML(notice(NO_MODELS))
        return
    by_name = {model.name: model for model in models}
    methods = method_choices()
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            picture = picture_input('Picture', height=240, elem_id='vh-tokens-picture')
            examples = example_gallery(_gallery(models[0]), 'vh-tokens-examples')
            model = model_choice(models, _about, 'vh-tokens-model')
            method = gr.Dropdown(methods, value=methods[0][1], label='Method', elem_id='vh-tokens-method')
            explanation = gr.HTML(_explanation(methods[0][1]))
            budget = gr.Slider(
                0.3, 1.0, value=0.65, step=0.05, label='Budget: share of the MACs', elem_id='vh-tokens-budget')
            run, stop = run_and_stop('Compare', 'vh-tokens')
            # Below the controls, where a phone shows it beside the result.
            status = gr.HTML(notice(_NOTHING_YET), elem_id='vh-tokens-status')
        with gr.Column(min_width=300):
            blocks = gr.HTML(_EMPTY, elem_id='vh-tokens-blocks')
            classes = gr.HTML(elem_id='vh-tokens-classes')
            numbers = gr.HTML(elem_id='vh-tokens-numbers')

    # Raw values (preprocess=False): see upload.py. `always_last`: of several quick changes only the last one counts.
    gr.on(
        [picture.change, model.change, method.change, budget.release, run.click],
        reduce_tokens, [picture, model, method, budget], [blocks, classes, numbers, status, stop],
        preprocess=False, show_progress='hidden', trigger_mode='always_last', api_visibility='private',
    )
    stop.click(_RUNNING.stop, queue=False, show_progress='hidden', api_visibility='private')

    def take_example(name: str, event: gr.SelectData) -> str:
        return str(examples_for(by_name[name])[event.index].path)

    def change_examples(name: str) -> List[Tuple[str, str]]:
        return _gallery(by_name[name])

    examples.select(take_example, model, picture, show_progress='hidden', api_visibility='private')
    model.change(change_examples, model, examples, show_progress='hidden', api_visibility='private')
    method.change(_explanation, method, explanation, show_progress='hidden', api_visibility='private')


def _gallery(model: TrainedModel) -> List[Tuple[str, str]]:
    return [(str(example.path), example.caption) for example in examples_for(model)]
