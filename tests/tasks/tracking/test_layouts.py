"""Benchmarks' folders: each layout as its readers' sources describe it, and what is wrong with a folder."""
import json

import numpy as np
import pytest
from PIL import Image

from vishub import InputError
from vishub.tasks.tracking.data import load_data
from vishub.tasks.tracking.layouts import detect, read_boxes, read_sequences


def frames(folder, numbers, digits=4, suffix='.jpg'):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new('RGB', (40, 30), (number % 256, 0, 0)).save(folder / f'{number:0{digits}d}{suffix}')


def truth(file, count, sep=',', first=5, absent=()):
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [['NaN'] * 4 if n in absent else [str(first + n), '6', '10', '8'] for n in range(count)]
    file.write_text('\n'.join(sep.join(row) for row in rows) + '\n')


def make_uav(root, version):
    truth(root / 'anno' / version / 'bird1_1.txt', 3)
    truth(root / 'anno' / version / 'bird1_2.txt', 2, absent=(1,))
    frames(root / 'data_seq' / 'UAV123' / 'bird1', range(1, 9), 6)
    table = {'bird1_1': {'folder_name': 'bird1', 'start_frame': 1, 'end_frame': 3},
             'bird1_2': {'folder_name': 'bird1', 'start_frame': 7, 'end_frame': 8}}
    (root / 'uav123.json').write_text(json.dumps({version: table}))


def make_flat(root, annotations='anno', sep=','):
    truth(root / annotations / 'car1.txt', 3, sep)
    frames(root / 'data_seq' / 'car1', range(3))


def make_112(root):
    make_flat(root, sep=' ')
    make_flat(root, 'anno_l')


def make_dtb(root):
    truth(root / 'Animal1' / 'groundtruth_rect.txt', 3)
    frames(root / 'Animal1' / 'img', range(1, 4), 5)


def make_otb(root):
    truth(root / 'David' / 'groundtruth_rect.txt', 3, '\t')
    frames(root / 'David' / 'img', [1, 2, 300, 301, 302])
    truth(root / 'Jogging' / 'groundtruth_rect.1.txt', 2)
    truth(root / 'Jogging' / 'groundtruth_rect.2.txt', 2, ' ', first=8)
    (root / 'Jogging' / 'groundtruth_rect.txt').write_text('')
    frames(root / 'Jogging' / 'img', [1, 2])


def make_got(root):
    for split, name, count in (('train', 'GOT-10k_Train_000001', 4), ('val', 'GOT-10k_Val_000001', 3),
                               ('test', 'GOT-10k_Test_000001', 1)):
        place = root / split / name
        truth(place / 'groundtruth.txt', count)
        frames(place, range(1, 5 if split == 'test' else count + 1), 8)
        (root / split / 'list.txt').write_text(f'{name}\n')
        (place / 'cover.label').write_text('8\n' * count)
        (place / 'absence.label').write_text('0\n' * (count - 1) + '1\n')


def make_lasot(root):
    for number in (1, 2):
        place = root / 'drone' / f'drone-{number}'
        truth(place / 'groundtruth.txt', 3)
        frames(place / 'img', range(1, 4), 8)
        (place / 'full_occlusion.txt').write_text('0,1,0\n')
        (place / 'out_of_view.txt').write_text('0,0,0\n')


def make_vot(root):
    frames(root / 'ball' / 'color', range(1, 3), 8)
    (root / 'ball' / 'sequence').write_text('fps=30\n')
    (root / 'ball' / 'groundtruth.txt').write_text('5,6,15,6,15,14,5,14\n6,6,10,8\n')
    frames(root / 'mask' / 'color', range(1, 2), 8)
    (root / 'mask' / 'groundtruth.txt').write_text('m0,0,3,3,1\n')
    (root / 'list.txt').write_text('ball\nmask\n')


def make_pysot(root):
    frames(root / 'car', range(2))
    rows = {'car': {'video_dir': 'car', 'init_rect': [5, 6, 10, 8], 'img_names': ['car/0000.jpg', 'car/0001.jpg'],
                    'gt_rect': [[5, 6, 10, 8], []], 'attr': []}}
    root.mkdir(exist_ok=True)
    (root / 'SET.json').write_text(json.dumps(rows))


LAYOUTS = {
    'UAV123': (lambda root: make_uav(root, 'UAV123'), {'bird1_1': 3, 'bird1_2': 2}),
    'UAV20L': (lambda root: make_uav(root, 'UAV20L'), {'bird1_1': 3, 'bird1_2': 2}),
    'UAV123@10fps': (make_flat, {'car1': 3}),
    'UAVTrack112': (make_112, {'car1': 3}),
    'UAVTrack112_L': (lambda root: make_flat(root, 'anno_l'), {'car1': 3}),
    'DTB70': (make_dtb, {'Animal1': 3}),
    'OTB': (make_otb, {'David': 3, 'Jogging.1': 2, 'Jogging.2': 2}),
    'GOT-10k': (make_got, {
        'train/GOT-10k_Train_000001': 4, 'val/GOT-10k_Val_000001': 3, 'test/GOT-10k_Test_000001': 4}),
    'LaSOT': (make_lasot, {'drone-1': 3, 'drone-2': 3}),
    'VOT': (make_vot, {'ball': 2}),
    'PySOT JSON': (make_pysot, {'car': 2}),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_layouts(name, tmp_path):
    make, expected = LAYOUTS[name]
    make(tmp_path)
    layout, sequences, _ = read_sequences(tmp_path)
    assert layout.name == name
    assert {sequence.name: len(sequence) for sequence in sequences} == expected
    for sequence in sequences:
        assert sequence.frame(0).shape == (30, 40, 3) and sequence.box(0).tolist()[1:] == [6, 10, 8]
    assert layout.protocol == ('got10k' if name == 'GOT-10k' else 'pysot')


def test_frame_ranges(tmp_path):
    make_uav(tmp_path / 'uav', 'UAV123')
    second = read_sequences(tmp_path / 'uav')[1][1]
    assert [file.name for file in second.files] == ['000007.jpg', '000008.jpg']
    assert np.isnan(second.box(1)).all()
    make_otb(tmp_path / 'otb')
    david = read_sequences(tmp_path / 'otb')[1][0]
    assert [file.name for file in david.files] == ['0300.jpg', '0301.jpg', '0302.jpg']


def test_absent_targets(tmp_path):
    make_got(tmp_path / 'got')
    sequence = read_sequences(tmp_path / 'got')[1][0]
    assert np.isnan(sequence.boxes).all(1).tolist() == [False, False, False, True]
    assert sequence.cover.tolist() == [8] * 4
    make_lasot(tmp_path / 'lasot')
    assert np.isnan(read_sequences(tmp_path / 'lasot')[1][0].boxes).all(1).tolist() == [False, True, False]
    make_vot(tmp_path / 'vot')
    _, sequences, warnings = read_sequences(tmp_path / 'vot')
    assert sequences[0].boxes.tolist() == [[5, 6, 10, 8], [6, 6, 10, 8]]
    assert len(warnings) == 1 and 'masks' in warnings[0]


def test_a_pysot_file_by_its_own_name(tmp_path):
    make_pysot(tmp_path)
    assert detect(tmp_path / 'SET.json').name == 'PySOT JSON'
    data = load_data(tmp_path / 'SET.json')
    assert data.name == 'PySOT JSON (SET)' and len(data.test) == 1 and data.train is None


def test_old_vot_is_told_from_got10k(tmp_path):
    place = tmp_path / 'bag'
    frames(place, range(1, 3), 8)
    (place / 'groundtruth.txt').write_text('5,6,15,6,15,14,5,14\n' * 2)
    (tmp_path / 'list.txt').write_text('bag\n')
    layout, sequences, _ = read_sequences(tmp_path)
    assert layout.name == 'VOT' and len(sequences[0]) == 2


def test_got10k_splits(tmp_path):
    make_got(tmp_path)
    data = load_data(tmp_path, num_samples=7)
    assert [video.name for video in data.test] == ['val/GOT-10k_Val_000001']  # the test split's truth is not public
    assert len(data.train) == 7 and len(data.train.video(3)) == 3  # without the absent frame
    assert data.protocol == 'got10k'
    only_test = load_data(tmp_path / 'test')
    assert len(only_test.test) == 1 and only_test.train is None and not only_test.test[0].measured


def test_unknown_folders(tmp_path):
    expected = (f"no known layout found in '{tmp_path}'; expected one of UAV123, UAV20L, UAV123@10fps, UAVTrack112, "
                'DTB70, OTB, GOT-10k, LaSOT, VOT, PySOT JSON')
    with pytest.raises(InputError) as raised:
        read_sequences(tmp_path)
    assert str(raised.value) == expected


def test_numbers_that_differ(tmp_path):
    make_dtb(tmp_path)
    truth(tmp_path / 'Animal1' / 'groundtruth_rect.txt', 2)
    with pytest.raises(InputError, match="'Animal1' has 3 frames and 2 boxes"):
        read_sequences(tmp_path)


def test_missing_and_broken_frames(tmp_path):
    make_pysot(tmp_path / 'pysot')
    (tmp_path / 'pysot' / 'car' / '0001.jpg').unlink()
    with pytest.raises(InputError, match=r"frame '.*0001.jpg' of sequence 'car' is missing"):
        read_sequences(tmp_path / 'pysot')
    make_dtb(tmp_path / 'dtb')
    (tmp_path / 'dtb' / 'Animal1' / 'img' / '00002.jpg').write_bytes(b'no picture')
    sequence = read_sequences(tmp_path / 'dtb')[1][0]
    with pytest.raises(InputError, match='00002.jpg'):
        sequence.frame(1)


def test_what_is_left_out_with_a_warning(tmp_path):
    make_dtb(tmp_path)
    truth(tmp_path / 'Gone' / 'groundtruth_rect.txt', 2, absent=(0,))
    frames(tmp_path / 'Gone' / 'img', range(2))
    truth(tmp_path / 'Empty' / 'groundtruth_rect.txt', 2)
    _, sequences, warnings = read_sequences(tmp_path)
    assert [sequence.name for sequence in sequences] == ['Animal1']
    assert sorted(warnings) == [
        "'Empty' has no frames and was left out.", "'Gone' has no true box in its first frame and was left out."]


def test_uav123_without_its_table(tmp_path):
    make_uav(tmp_path, 'UAV123')
    (tmp_path / 'uav123.json').unlink()
    with pytest.raises(InputError, match='pip install got10k'):
        read_sequences(tmp_path)


@pytest.mark.parametrize('text', ['1,2,3\n', '1,2,3,4\n1,2,x,4\n', '1 2 3 4 5\n'])
def test_bad_boxes(text, tmp_path):
    (tmp_path / 'boxes.txt').write_text(text)
    with pytest.raises(InputError, match=r'boxes.txt., line \d: .* is not x, y, w, h'):
        read_boxes(tmp_path / 'boxes.txt')
