"""Does a LiT that inherits from a DiT and is taught by it learn faster than one that starts from nothing?

    python benchmarks/inheritance.py --run 'inherited, distilled=runs/lit' --run 'from scratch=runs/scratch'

Reads the log.csv of runs of `vishub train generation` with a judge, all with the same steps, schedule and data. Writes
inheritance.{json,md,png}: class agreement and Fréchet distance over the steps, and the step at which the first run
reaches what the last run ends with.
"""
import argparse
import csv
import json
from pathlib import Path
from typing import Any, Dict, List, Optional

RESULTS = Path(__file__).parent / 'results'


def read_run(folder: Path) -> List[Dict[str, float]]:
    """The validated epochs of a run."""
    with open(folder / 'log.csv', newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    return [
        {'step': int(row['step']), 'agreement': float(row['agreement']), 'frechet': float(row['frechet'])}
        for row in rows if row.get('agreement')]


def first_step(rows: List[Dict[str, float]], key: str, goal: float) -> Optional[int]:
    """The first step at which a run is as good as `goal`; None if it never is."""
    for row in rows:
        if row[key] >= goal if key == 'agreement' else row[key] <= goal:
            return int(row['step'])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--run', action='append', required=True, metavar='NAME=FOLDER')
    parser.add_argument('--output', type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = {name: read_run(Path(folder)) for name, _, folder in (item.partition('=') for item in args.run)}
    first, last = list(runs)[0], list(runs)[-1]
    total = int(runs[last][-1]['step'])
    report: Dict[str, Any] = {'runs': runs, 'reached': {}}
    lines = ['# Inheritance and distillation against training from scratch', '', '| steps | ' + ' | '.join(
        f'{name}: agreement % | {name}: distance' for name in runs) + ' |', '|---' * (2 * len(runs) + 1) + '|']
    for step in sorted({int(row['step']) for rows in runs.values() for row in rows}):
        cells = []
        for rows in runs.values():
            row = next((row for row in rows if row['step'] == step), None)
            cells.append(f'{row["agreement"]:.1f} | {row["frechet"]:.2f}' if row else '– | –')
        lines.append(f'| {step} | ' + ' | '.join(cells) + ' |')
    lines.append('')
    for key, title in (('agreement', 'agreement'), ('frechet', 'distance')):
        goal = runs[last][-1][key]
        step = first_step(runs[first], key, goal)
        report['reached'][key] = {'goal': goal, 'step': step, 'share': None if step is None else step / total}
        lines.append(
            f"- *{first}* reaches the final {title} of *{last}*, {goal:g}, " + (
                'never.' if step is None else
                f'at the validation after {step} of {total} steps ({100 * step / total:.0f} %).'))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / 'inheritance.json').write_text(json.dumps(report, indent=2) + '\n')
    (args.output / 'inheritance.md').write_text('\n'.join(lines) + '\n')

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 3.8), layout='constrained')
    FigureCanvasAgg(figure)
    for axis, (key, label) in zip(figure.subplots(1, 2), (
            ('agreement', 'class agreement, %'), ('frechet', "Fréchet distance in the judge's features"))):
        for name, rows in runs.items():
            axis.plot([row['step'] for row in rows], [row[key] for row in rows], marker='o', label=name)
        axis.set(xlabel='steps', ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(args.output / 'inheritance.png', dpi=120)
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
