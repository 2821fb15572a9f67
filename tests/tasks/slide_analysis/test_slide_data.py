"""Which slides a task has: folders, tables, folds, and slides that cannot be used."""
import json

import pytest

from vishub import InputError
from vishub.tasks.slide_analysis.data import collate, encode_tasks, find_tasks, lesions_of, limited, read_task
from vishub.tasks.slide_analysis.encoders import load_encoder
from vishub.tasks.slide_analysis.features import FeatureCache
from vishub.tasks.slide_analysis.procedural import write_pyramid
from vishub.tasks.slide_analysis.tissue import Tiling


def _touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_folder_with_splits(tmp_path):
    _touch(tmp_path, 'train/b/1.svs', 'train/a/2.svs', 'train/a/notes.txt', 'test/a/3.svs', 'val/b/4.h5')
    task = read_task(tmp_path)
    assert task.classes == ('a', 'b') and task.name == tmp_path.name
    assert [len(rows) for rows in (task.train, task.val, task.test)] == [2, 1, 1]
    assert [task.name for task in find_tasks(tmp_path.parent, [tmp_path.name])] == [tmp_path.name]
    with pytest.raises(InputError, match="has no task 'none'"):
        find_tasks(tmp_path.parent, ['none'])


def test_folds_are_even_and_keep_patients_together(tmp_path):
    lines = ['path,label,case_id'] + [
        f'{label}{n}.svs,{label},{label}{n // 2}' for label in 'ab' for n in range(20)]  # two slides a patient
    (tmp_path / 'task.csv').write_text('\n'.join(lines))
    tested = []
    for fold in range(5):
        task = read_task(tmp_path / 'task.csv', fold, 5)
        assert [sum(row.label == label for row in task.test) for label in 'ab'] == [4, 4]
        assert not {row.case for row in task.test} & {row.case for row in task.train}
        assert len(task.train) == 32
        tested += [row.path for row in task.test]
    assert len(set(tested)) == len(tested) == 40
    other = read_task(tmp_path / 'task.csv', 0, 5, seed=1)
    assert {row.case for row in other.test} != {row.case for row in read_task(tmp_path / 'task.csv').test}


def test_official_table(tmp_path):
    (tmp_path / 'task.csv').write_text(
        'slide_id,label,case_id,split\ns1,x,p1,train\ns2,y,p2,train\ns3,x,p3,test\n')
    task = read_task(tmp_path / 'task.csv')
    assert task.train[0].path == str(tmp_path / 'h5_files' / 's1.h5') and task.test[0].label == 'x'


@pytest.mark.parametrize('content, sentence', [
    ('path,label\na.svs,\n', 'line 2: columns path'),
    ('path,label,split\na.svs,x,later\n', "split 'later' is not"),
    ('path,label,split\na.svs,x,train\nb.svs,y,\n', 'in every line or in none'),
    ('path,label,split\na.svs,x,train\nb.svs,x,test\n', 'has one class, x'),
    ('path,label,split\na.svs,x,train\nb.svs,y,test\n', "no training slides of class 'y'"),
    ('path,label,split\na.svs,x,train\nb.svs,y,train\n', 'has no test slides'),
])
def test_bad_tables(tmp_path, content, sentence):
    (tmp_path / 'task.csv').write_text(content)
    with pytest.raises(InputError, match=sentence):
        read_task(tmp_path / 'task.csv')


def test_bad_tasks(tmp_path):
    with pytest.raises(InputError, match='neither a folder'):
        read_task(tmp_path / 'none')
    with pytest.raises(InputError, match='give 0 to 4'):
        read_task(tmp_path, fold=5)
    for name in ('one', 'two'):
        _touch(tmp_path / name, 'train/a/1.svs', 'train/b/2.svs', 'test/a/3.svs')
    with pytest.raises(InputError, match="class 'a' comes twice"):
        encode_tasks([read_task(tmp_path / 'one'), read_task(tmp_path / 'two')], None, None, Tiling())
    with pytest.raises(InputError, match="task 'one' comes twice"):
        encode_tasks([read_task(tmp_path / 'one')] * 2, None, None, Tiling())


def test_slides_that_cannot_be_used(tmp_path, drawn):
    root = tmp_path / 'task'
    for place in ('train/a/1', 'train/b/2', 'test/a/3'):
        (root / place).parent.mkdir(parents=True)
        write_pyramid(root / f'{place}.tif', drawn[0])
    (root / 'train/b/bad.svs').write_text('none')
    options = dict(encoder=load_encoder('texture_bank', 8), cache=FeatureCache(tmp_path / 'cache'),
                   tiling=Tiling(patch_size=16, max_regions=1))
    with pytest.raises(InputError, match='bad.svs'):
        encode_tasks([read_task(root)], **options)
    calls = []
    (task,), left_out = encode_tasks(
        [read_task(root)], first_class=4, skip_bad=True, progress=lambda *a: calls.append(a), **options)
    assert [item.label for item in task.train] == [4, 5] and len(left_out) == 1 and 'bad.svs' in left_out[0]
    assert calls[-1] == (4, 4) and task.train[0].load().patch.shape == (1, 8, 8, 128)


def test_batches_limits_and_annotations(features_tasks, tmp_path):
    from vishub.tasks.slide_analysis.data import SlideSet, SlideTask
    samples = [SlideSet(features_tasks[0].train)[0, index, 64] for index in range(3)]
    batch = collate(samples)
    most = max(len(sample['region']) for sample in samples)
    assert batch['patch'].shape == (3, most, 4, 4, 16) and batch['mask'].sum(1).tolist() == [
        len(sample['region']) for sample in samples]
    rows = tuple(item.row for item in features_tasks[0].test)
    few = limited([SlideTask('x', ('c0', 'c1'), (), (), rows)], 2)[0].test
    assert [row.label for row in few] == ['c0', 'c1']
    assert lesions_of(tmp_path / 'slide.svs') is None
    square = [[0, 0], [4, 0], [4, 2], [0, 2], [0, 0]]
    (tmp_path / 'slide.geojson').write_text(json.dumps({'features': [{'geometry': {'coordinates': [square]}}]}))
    assert lesions_of(tmp_path / 'slide.svs') == [(0, 0, 4, 2)]
    (tmp_path / 'slide.geojson').write_text('{}')
    with pytest.raises(InputError, match='no GeoJSON'):
        lesions_of(tmp_path / 'slide.svs')
