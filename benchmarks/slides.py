"""Speed of slide analysis: tiles a second from the file on, and HIT beside the cost of the official layout.

    python benchmarks/slides.py                            # one CPU thread
    python benchmarks/slides.py --regions 16 --rounds 2

First a procedural slide is analysed end to end; each stage's share of the time is told. Then the network: a forward
pass, and a training step (one slide, two replayed ones of as many regions, Adam). *Official* is the same network used
as the official code uses its own: attention maps and similarity are always computed, and replayed slides carry
gradients through the patch branch, where they vanish. Its 31.3 M parameters that no forward uses (125 MB) are not
built: they take memory, no time. Both take turns.
"""
import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F
from page import add_options, begin, write
from timing import clock_name, ratios, take_turns, timer

import vishub  # noqa: F401  registers the models
from vishub.models.conslide import mean_similarity_loss
from vishub.tasks.slide_analysis.pipeline import SlideAnalysisPipeline
from vishub.tasks.slide_analysis.procedural import draw_slide, write_pyramid

Slide = Tuple[torch.Tensor, torch.Tensor]


def end_to_end(pipe: SlideAnalysisPipeline, side: int, rounds: int) -> Dict[str, Any]:
    """Patches a second from the file to the heat map, and each stage's share; medians over the rounds."""
    pixels, _ = draw_slide('organ_a', 'rings', side=side)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_pyramid(Path(folder) / 'slide.tif', pixels)
        for number in range(rounds + 1):  # the first warms up
            result: Any = pipe(path, top_k=0)
            if number:
                rows.append(result.seconds)
    total = statistics.median(sum(row.values()) for row in rows)
    tiles = result.patch_heat.size
    return {
        'encoder': result.encoder, 'side': side, 'regions': len(result.coords), 'patches': tiles,
        'tissue_patches': int((result.patch_tissue > 0).sum()), 'seconds': total, 'patches_per_second': tiles / total,
        'shares': {stage: statistics.median(row[stage] / sum(row.values()) for row in rows) for stage in rows[0]},
    }


def forward(model: Any, slide: Slide, official: bool) -> Callable[[], object]:
    def call() -> Any:
        with torch.inference_mode():
            return model(*slide, return_attention=official, return_similarity=official)
    return call


def step(model: Any, slide: Slide, official: bool) -> Callable[[], object]:
    """A training step with a replayed slide of each of two classes."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    label = torch.zeros(1, dtype=torch.long, device=slide[0].device)

    def call() -> None:
        output = model(*slide, return_attention=official, return_similarity=True)
        loss = F.cross_entropy(output.logits, label) + 1e-5 * mean_similarity_loss(output.sim_loss)
        for _ in range(2):
            replayed = model(*slide, return_attention=official, return_similarity=official)
            loss = loss + 0.2 * F.cross_entropy(replayed.logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return call


def network(name: str, regions: Sequence[int], rounds: int, device: str, threads: int) -> List[Dict[str, Any]]:
    """A row for each number of regions and kind of work."""
    rows = []
    for count in regions:
        model: Any = timm.create_model(name).to(device)
        slide = tuple(torch.randn_like(x) for x in model.example_inputs(count))
        for work, make in (('forward', forward), ('training step', step)):
            model.train(make is step)
            seconds = take_turns({
                key: timer(make(model, slide, key == 'official'), device, threads)  # type: ignore[arg-type]
                for key in ('official', 'vishub')}, rounds)
            faster = ratios(seconds['official'], seconds['vishub'])
            rows.append({
                'model': name, 'regions': count, 'work': work,
                **{f'{key}_seconds': statistics.median(values) for key, values in seconds.items()},
                'faster': statistics.median(faster), 'range': [min(faster), max(faster)]})
            print(f'{name}, {count} regions, {work}: {rows[-1]["faster"]:.2f} times', flush=True)
    return rows


def report(whole: Dict[str, Any], rows: Sequence[Dict[str, Any]], setting: Dict[str, Any]) -> str:
    """The Markdown page."""
    shares = ', '.join(f'{stage} {share:.0%}' for stage, share in whole['shares'].items())
    lines = [
        f'# Slide analysis, {setting["device"]}', '',
        ', '.join(f'{key.replace("_", " ")} {value}' for key, value in setting.items()) + '.', '',
        '## From the file to the heat map', '',
        f'A procedural slide of {whole["side"]:,} x {whole["side"]:,} pixels, {whole["regions"]} regions of 8 x 8 '
        f'patches ({whole["tissue_patches"]:,} of {whole["patches"]:,} with tissue), encoder `{whole["encoder"]}`, '
        f'wall time: **{whole["patches_per_second"]:,.0f} patches a second**, {whole["seconds"]:.2f} s in all. '
        f'Shares: {shares}.', '',
        '## The network', '',
        'Medians over the rounds, in which both took turns. *Official*: the same network used as the official code '
        'uses its own (similarity and attention maps always, replay with gradients through the patch branch). '
        "*Times*: its time over vishub's, paired round by round.", '',
        '| model | regions | work | official | vishub | times (range) |', '| --- | --- | --- | --- | --- | --- |']
    for row in rows:
        low, high = row['range']
        lines.append(
            f'| {row["model"]} | {row["regions"]} | {row["work"]} | {row["official_seconds"]:.3f} s '
            f'| {row["vishub_seconds"]:.3f} s | {row["faster"]:.2f} ({low:.2f} to {high:.2f}) |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='conslide_hit')
    parser.add_argument('--weights', default='conslide_hit_tiny.procedural_he', help='for the whole way')
    parser.add_argument('--side', type=int, default=1024, help='of the slide, pixels')
    parser.add_argument('--regions', nargs='+', type=int, default=[16, 110], metavar='N')
    add_options(parser, rounds=3)
    options = parser.parse_args()
    setting = begin(options)
    whole = end_to_end(SlideAnalysisPipeline(options.weights, options.device), options.side, options.rounds)
    print(f'{whole["patches_per_second"]:,.0f} patches a second', flush=True)
    rows = network(options.model, options.regions, options.rounds, options.device, options.threads)
    told = {**setting(), 'clock': f'{clock_name(options.device, options.threads)} (network)'}
    write(options, 'slides', report(whole, rows, told), {**told, 'end_to_end': whole, 'rows': rows})


if __name__ == '__main__':
    main()
