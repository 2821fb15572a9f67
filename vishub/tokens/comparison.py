"""What `compare` measured, to read: a table, Markdown, a plot, files."""
import json
from pathlib import Path
from typing import Any, List, Mapping, Tuple, Union

from vishub.files import atomic_path

__all__ = [
    'amount', 'comparison_cells', 'comparison_markdown', 'method_title', 'plot_comparison', 'row_title',
    'save_comparison',
]

UNREDUCED = 'none'  # the method of the unreduced model's row
_KINDS = ('searched', 'tuned')
_TITLES = {
    UNREDUCED: 'Unreduced', 'tome': 'ToMe', 'zero_tprune': 'Zero-TPrune', 'token_transforming': 'Token Transforming',
    'pyra': 'PYRA', 'class_attention': 'Class attention', 'uniform': 'Uniform', 'random': 'Random',
}


def method_title(method: str) -> str:
    """A method's name as its paper writes it."""
    return _TITLES.get(method, method)


def place(method: str) -> int:
    """For sorting: in the order of the tables."""
    return list(_TITLES).index(method) if method in _TITLES else len(_TITLES)


def row_title(row: Mapping[str, Any]) -> str:
    """The method, and what was done besides: `ToMe, searched`."""
    return ', '.join([method_title(row['method']), *(kind for kind in _KINDS if row.get(kind))])


def amount(count: float) -> str:
    """Multiply-accumulates to three digits, e.g. `2.99 G`."""
    for unit, size in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if count >= size:
            return f'{count / size:.3g} {unit}'
    return f'{count:.0f}'


def comparison_cells(report: Mapping[str, Any]) -> Tuple[List[str], List[List[str]]]:
    """Head and cells of the table, for the screen and Markdown alike."""
    head = ['Method', 'MACs', 'share %', '+ deciding %', 'Top-1 %', '95 % interval', 'change', '95 % interval',
            'agrees %']
    if report['rounds']:
        head += ['ms, batch 1', 'speed-up', f'images/s, batch {report["batch_size"]}', 'speed-up']
    body = []
    for row in report['rows']:
        unreduced = row['method'] == UNREDUCED
        cells = [
            row_title(row), amount(row['macs']), f'{100 * row["macs_share"]:.1f}', f'{100 * row["overhead_share"]:.2f}',
            f'{row["top1"]:.2f}', '{:.2f} to {:.2f}'.format(*row['top1_ci95']),
            '' if unreduced else f'{row["change"]:+.2f}',
            '' if unreduced else '{:+.2f} to {:+.2f}'.format(*row['change_ci95']),
            '' if unreduced else f'{row["agreement"]:.1f}',
        ]
        if report['rounds']:
            cells += [f'{row["latency_ms"]:.2f}', f'{row["latency_speedup"]:.2f}', f'{row["throughput"]:.0f}',
                      f'{row["throughput_speedup"]:.2f}']
        body.append(cells)
    return head, body


def comparison_markdown(report: Mapping[str, Any], command: str = '', plot: str = '') -> str:
    """The report to read.

    Args:
        report: Of `compare`.
        command: What made it, to be shown.
        plot: File name of the picture, to be shown.
    """
    head, body = comparison_cells(report)
    how = [
        f'{report["model"]} ({report["num_params"] / 1e6:.2f} M parameters, {report["tokens"]} tokens, '
        f'{amount(report["macs"])} multiply-accumulates) on {report["num_images"]:,} images of {report["data"]}, '
        f'{report["split"]}. All methods are applied to the same weights, without training where nothing else is '
        'said, and have at most the multiply-accumulates of their target; what deciding costs comes on top and has '
        "its own column. Intervals of top-1 are Wilson's; those of the change are paired, since all methods saw the "
        'same images.',
    ]
    if report['rounds']:
        how.append(f'Speeds: {report["clock"]} on {report["hardware"]}, fp32, medians of {report["rounds"]} '
                   'interleaved rounds; speed-ups are medians of the ratios to the unreduced model in the same round.')
    if report['search_trials']:
        how.append(f'Searched: schedule and options by `tokens.search`, {report["search_trials"]} trials on at most '
                   f'{report["calibration_images"]} training images, by agreement with the unreduced '
                   'model, without labels.')
    if report.get('tune_steps'):
        how.append(f'Tuned: {report["tune_steps"]} steps of {report["batch_size"]} training images as PYRA trains (low-'
                   'rank updates of rank 8 and the classifier, the rest frozen); ToMe, tuned, is the same without the '
                   'gates.')
    lines = [f'# Token reduction of {report["model"]} on {report["data"]}', '', ' '.join(how), '']
    if plot:
        lines += [f'![Accuracy against multiply-accumulates and speed]({plot})', '']
    lines += ['| ' + ' | '.join(head) + ' |', '|---' + '|---:' * (len(head) - 1) + '|']
    lines += ['| ' + ' | '.join(cells) + ' |' for cells in body]
    lines += ['', *(f'- {note}' for note in report['notes'])]
    if command:
        lines += ['', f'    {command}']
    return '\n'.join(lines).rstrip() + '\n'


def save_comparison(report: Mapping[str, Any], folder: Union[str, Path], command: str = '') -> List[Path]:
    """Write `tokens_accuracy_<data>.json`, `.png` and `.md`, each whole or not at all.

    Returns:
        The files.
    """
    stem = Path(folder) / f'tokens_accuracy_{report["data_tag"]}'
    files = [stem.with_suffix(suffix) for suffix in ('.json', '.png', '.md')]
    with atomic_path(files[0]) as temporary:
        temporary.write_text(
            json.dumps({**report, 'command': command}, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    plot_comparison(report, files[1])
    with atomic_path(files[2]) as temporary:
        temporary.write_text(comparison_markdown(report, command, files[1].name), encoding='utf-8')
    return files


# Colours that stay apart for the colour-blind (Okabe and Ito); what methods have to beat is grey.
_STYLES = {
    'tome': ('#0072B2', 'o'), 'zero_tprune': ('#D55E00', 's'), 'token_transforming': ('#009E73', 'D'),
    'pyra': ('#CC79A7', 'P'), 'class_attention': ('#4D4D4D', '^'), 'uniform': ('#8C8C8C', 'p'),
    'random': ('#B5B5B5', 'v'),
}
_OTHERS = ('#E69F00', '#56B4E9', '#F0E442')


def _line(row: Mapping[str, Any]) -> Tuple[Any, ...]:
    """What makes a line of the plot: the method, and whether it was searched and tuned."""
    return (row['method'], *(bool(row.get(kind)) for kind in _KINDS))


def plot_comparison(report: Mapping[str, Any], path: Union[str, Path]) -> None:
    """Draw accuracy against multiply-accumulates and, where it was measured, against throughput; save the picture.

    Args:
        report: Of `compare`.
        path: Picture file; its suffix tells the format.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    from vishub.tasks.classification.metrics import new_figure
    base, rows = report['rows'][0], report['rows'][1:]
    panels = [('macs_share', 100., 'multiply-accumulates, % of the unreduced model')]
    if report['rounds']:
        panels.append(('throughput_speedup', 1., f'measured throughput, times the unreduced model '
                                                 f'(batch {report["batch_size"]})'))
    figure = new_figure(5.4 * len(panels) + 0.4, 4.9)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = sorted({_line(row) for row in rows}, key=lambda name: (place(name[0]), name[1]))
    both = {name for name, *kinds in names if any(kinds)}
    unknown = [name for name, *_ in names if name not in _STYLES]
    for axis, (key, scale, label) in zip(axes, panels):
        low, high = base['top1_ci95']
        axis.axhspan(low, high, color='#000000', alpha=0.06, linewidth=0)
        axis.axhline(base['top1'], color='#000000', linewidth=0.9, linestyle=(0, (5, 3)))
        for name, *kinds in names:
            colour, marker = _STYLES.get(name) or (_OTHERS[unknown.index(name) % len(_OTHERS)], 'h')
            line = [base] + [row for row in rows if _line(row) == (name, *kinds)]
            line.sort(key=lambda row: -row['macs_share'])
            faint = name in both and not any(kinds)  # the same method without search or tuning, where both are there
            x, y = [scale * row[key] for row in line], [row['top1'] for row in line]
            axis.plot(
                x, y, color=colour, linewidth=1.2 if faint else 1.8, linestyle=':' if faint else '-', zorder=3,
                marker=marker, markevery=slice(1, None), markersize=5 if faint else 6.5,
                markerfacecolor='white' if faint else colour, markeredgecolor=colour if faint else 'white',
                markeredgewidth=1.1 if faint else 0.7, label=row_title({'method': name, **dict(zip(_KINDS, kinds))}))
            if not faint:
                tails = [[row['top1'] - row['top1_ci95'][0] for row in line[1:]],
                         [row['top1_ci95'][1] - row['top1'] for row in line[1:]]]
                axis.errorbar(x[1:], y[1:], yerr=tails, fmt='none', ecolor=colour, alpha=0.5, elinewidth=1, zorder=2)
        axis.plot([scale * base[key]], [base['top1']], marker='o', color='#000000', markersize=6, zorder=4,
                  linestyle='none')
        axis.set_xlabel(label)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[['top', 'right']].set_visible(False)
        axis.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axes[0].set_xticks(sorted({100 * row['target'] for row in report['rows']}))
    axes[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    axes[0].invert_xaxis()  # less work to the right, as more speed is in the other panel
    axes[0].annotate(f'unreduced {base["top1"]:.1f} %', (1, base['top1']), xycoords=('axes fraction', 'data'),
                     xytext=(-2, 4), textcoords='offset points', ha='right', fontsize='small')
    axes[0].set_ylabel(f'top-1 accuracy on {report["data"]}, %')
    figure.suptitle(
        f'{report["model"]}: token reduction{"" if report.get("tune_steps") else " without training"}, '
        f'{report["num_images"]:,} images, 95 % intervals',
        fontsize='medium')
    if names:
        figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', frameon=False,
                      ncols=min(len(names), 4 * len(panels) - 1), fontsize='small')
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=160)
