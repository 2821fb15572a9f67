"""`vishub train slide_analysis` from tables of features to a folder of weights, and a later task on top."""
import json

import pytest
import timm

from vishub import InputError
from vishub.cli import app
from vishub.tasks.batch import predict_files
from vishub.tasks.slide_analysis.pipeline import SlideAnalysisPipeline
from vishub.tasks.slide_analysis.setting import SlideSetting


@pytest.fixture
def tables(features_tasks, tmp_path):
    """A CSV for each of the three tasks."""
    for task in features_tasks:
        lines = ['path,label,split'] + [
            f'{item.features},{item.row.label},{split}' for split in ('train', 'test') for item in getattr(task, split)]
        (tmp_path / f'{task.name}.csv').write_text('\n'.join(lines))
    return [str(tmp_path / f'{task.name}.csv') for task in features_tasks]


def run(tables, output, *more):
    tasks = [word for table in tables for word in ('--task', table)]
    app(['train', 'slide_analysis', *tasks, '--output', str(output), '--model', 'conslide_hit_tiny',
         '--model-arg', 'in_features=16', '--model-arg', 'dim=16', '--buffer', '24', '--bag', '2', '4',
         '--warmup-epochs', '1', '--resolution', '64:1', '--lr', '3e-3', '--device', 'cpu', '--no-progress',
         *more], standalone_mode=False)


def test_two_tasks_then_a_third(tables, tmp_path):
    run(tables[:2], tmp_path / 'first', '--data-name', 'marked noise', '--tag', 'noise')
    folder = tmp_path / 'first' / 'conslide_hit_tiny.noise'
    metrics = json.loads((folder / 'metrics.json').read_text())
    assert metrics['data'] == 'marked noise' and metrics['num_test'] == 12
    assert len(metrics['report']['sequence']['acc']) == 2 and 'forgetting' in metrics['metrics']
    card = (folder / 'README.md').read_text()
    assert 'Not a medical device' in card and 'tasks.png' in card and (folder / 'tasks.png').is_file()
    setting = SlideSetting.of(json.loads((folder / 'config.json').read_text())['pretrained_cfg'], 4)
    assert dict(setting.tasks) == {'task0': ('c0', 'c1'), 'task1': ('c2', 'c3')} and setting.encoder is None
    assert setting.tiling.grid == 4
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).head.out_features == 4

    run(tables[2:], tmp_path / 'second', '--continue-from', str(tmp_path / 'first'))
    grown = json.loads((tmp_path / 'second' / 'conslide_hit_tiny.buro' / 'metrics.json').read_text())
    assert grown['num_test'] == 18 and [len(row) for row in grown['report']['sequence']['acc']] == [2, 2, 3]
    with pytest.raises(InputError, match='goes on with one fold'):
        run(tables[2:], tmp_path / 'third', '--continue-from', str(tmp_path / 'first'), '--fold', '0', '--fold', '1')


def test_folds_have_a_mean(tables, tmp_path):
    for table in tables[:1]:
        with open(table) as file:
            lines = [line.rsplit(',', 1)[0] for line in file.read().splitlines()]
        with open(table, 'w') as file:
            file.write('\n'.join(lines))
    run(tables[:1], tmp_path / 'folds', '--folds', '3', '--fold', '0', '--fold', '2', '--method', 'finetune')
    summary = json.loads((tmp_path / 'folds' / 'folds.json').read_text())
    assert len(summary['acc']['folds']) == 2 and summary['acc']['sd'] is not None
    assert (tmp_path / 'folds' / 'fold-2' / 'conslide_hit_tiny.finetune' / 'model.safetensors').is_file()


def test_one_slide_shows_its_own_progress(network_folder, slide_path, monkeypatch):
    pipe = SlideAnalysisPipeline(f'local-dir:{network_folder}', 'cpu')
    shown = []

    class Bar:
        def __init__(self, **options):
            assert options['disable'] is False

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def add_task(self, description, **options):
            return description

        def update(self, task, **options):
            shown.append((options['completed'], options['total']))

    monkeypatch.setattr('sys.stderr.isatty', lambda: True, raising=False)
    monkeypatch.setattr('vishub.tasks.batch.progress_bar', Bar)
    (_, outcome), = predict_files(pipe, [str(slide_path)], max_regions=3)
    assert shown[0] == (0, 3) and shown[-1] == (3, 3) and len(outcome.coords) == 3
