"""Data sets in their published formats, made small; what is damaged is refused in one sentence."""
import gzip
import io
import pickle
import re
import struct

import numpy as np
import pytest
from PIL import Image

from vishub.errors import InputError
from vishub.tasks.classification.data import (
    AUGMENTATIONS,
    CIFAR10_CLASSES,
    AugmentedSet,
    ImageData,
    ImageSet,
    load_data,
    make_augmentation,
)

RNG = np.random.default_rng(0)


def refused(path, match, **options):
    """Loading fails with one sentence that names what is wrong."""
    with pytest.raises(InputError, match=match) as caught:
        load_data(path, **options)
    assert '\n' not in str(caught.value)


# -- packed CIFAR-10 --------------------------------------------------------------------------------------------------

def packed(count=60, classes=3, **changes):
    """Arrays of a packed set: 2/3 training images, sorted by class as the real one is."""
    labels = np.sort(np.arange(count) % classes)
    files = []
    for label in labels:
        file = io.BytesIO()
        Image.new('RGB', (32, 32), (80 * int(label), 90, 200)).save(file, 'JPEG')
        files.append(file.getvalue())
    arrays = {
        'blob': np.frombuffer(b''.join(files), dtype=np.uint8),
        'offsets': np.cumsum([0, *map(len, files)]),
        'labels': labels,
        'is_test': np.arange(count) % 3 == 2,
        'classes': np.array([f'class {i}' for i in range(classes)]),
    }
    return {**arrays, **changes}


def test_packed(tmp_path):
    np.savez(tmp_path / 'set.npz', **packed(count=90))
    data = load_data(tmp_path / 'set.npz')
    assert (data.name, data.tag, data.classes) == ('CIFAR-10 (JPEG)', 'cifar10', ('class 0', 'class 1', 'class 2'))
    # 60 training images, 20 a class: the last 2 of each class are the validation split
    assert [np.bincount(split.labels).tolist() for split in (data.train, data.val, data.test)] == [
        [18] * 3, [2] * 3, [10] * 3]
    assert data.train.images.shape == (54, 32, 32, 3) and data.train.images.dtype == np.uint8
    for split in (data.train, data.val, data.test):
        assert np.abs(split.images[:, 0, 0, 0].astype(int) - 80 * split.labels).max() < 6  # image and label belong


def test_packed_refused(tmp_path):
    path = tmp_path / 'set.npz'
    path.write_bytes(b'')
    refused(path, 'not a packed image set')
    np.savez(path, **packed())
    path.write_bytes(path.read_bytes()[:-200])
    refused(path, 'not a packed image set')
    arrays = packed()
    np.savez(path, **{k: v for k, v in arrays.items() if k != 'labels'})
    refused(path, 'labels')
    np.savez(path, **{**arrays, 'labels': arrays['labels'][:-1]})
    refused(path, '60 images, 59 labels')
    np.savez(path, **{**arrays, 'labels': arrays['labels'] + 1})
    refused(path, 'labels from 1 to 3; its 3 classes are 0 to 2')
    np.savez(path, **{**arrays, 'labels': arrays['labels'] * 0, 'classes': np.array(['all'])})
    refused(path, r'1 class\(es\)')
    np.savez(path, **{**arrays, 'is_test': np.ones(60, dtype=bool)})
    refused(path, 'no training images')
    blob = arrays['blob'].copy()
    blob[arrays['offsets'][7]:arrays['offsets'][8]] = 0
    np.savez(path, **{**arrays, 'blob': blob})
    refused(path, 'image 7 of .* cannot be decoded')


def test_packed_pickle_is_refused(tmp_path):
    arrays = packed()
    arrays['labels'] = arrays['labels'].astype(object)  # numpy stores objects as a pickle
    np.savez(tmp_path / 'set.npz', **arrays)
    refused(tmp_path / 'set.npz', 'not a packed image set')


# -- torchvision's CIFAR-10 -------------------------------------------------------------------------------------------

def batch_as_published(pixels, labels):
    """The bytes of a batch as Python 2 and its numpy wrote the published ones (protocol 2, text strings)."""
    def text(value):
        return b'U' + bytes([len(value)]) + value

    def number(value):
        return b'J' + struct.pack('<i', value)

    dtype = (
        b'cnumpy\ndtype\n(' + text(b'u1') + b'K\x00K\x01tR'
        + b'(K\x03' + text(b'|') + b'NNN' + 2 * number(-1) + b'K\x00tb')
    array = (
        b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t' + text(b'b') + b'tR'
        + b'(K\x01(' + number(pixels.shape[0]) + number(pixels.shape[1]) + b't' + dtype
        + b'\x89T' + struct.pack('<i', pixels.size) + pixels.tobytes() + b'tb')
    items = b'](' + b''.join(map(number, labels)) + b'e'
    return (
        b'\x80\x02}(' + text(b'batch_label') + text(b'training batch 1 of 5') + text(b'labels') + items
        + text(b'data') + array + text(b'filenames') + b']u.')


def write_cifar10(folder, write=batch_as_published, per_batch=30):
    folder.mkdir()
    content = {}
    for name in (*(f'data_batch_{n}' for n in range(1, 6)), 'test_batch'):
        pixels = RNG.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        labels = RNG.permutation(np.arange(per_batch) % 10).tolist()
        (folder / name).write_bytes(write(pixels, labels))
        content[name] = pixels, labels
    return content


def written_today(pixels, labels):
    return pickle.dumps({'data': pixels, 'labels': labels}, protocol=2)


def test_the_batches_of_this_test_are_pickles_as_torchvision_reads_them():
    pixels = RNG.integers(0, 256, (3, 3072), dtype=np.uint8)
    batch = pickle.loads(batch_as_published(pixels, [4, 0, 9]), encoding='latin1')
    assert np.array_equal(batch['data'], pixels) and batch['labels'] == [4, 0, 9]


@pytest.mark.parametrize('write', [batch_as_published, written_today])
def test_torchvision_cifar10(tmp_path, write):
    content = write_cifar10(tmp_path / 'cifar-10-batches-py', write)
    data = load_data(tmp_path)
    assert load_data(tmp_path / 'cifar-10-batches-py').name == data.name == 'CIFAR-10'
    assert data.classes == CIFAR10_CLASSES
    # 15 training images a class: 1 of each for validation
    assert [len(split) for split in (data.train, data.val, data.test)] == [140, 10, 30]
    pixels, labels = content['test_batch']
    assert data.test.labels.tolist() == labels
    # as torchvision: planes of red, green, blue, each row by row
    assert np.array_equal(data.test.images, pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    first = content['data_batch_1'][0][0]
    assert np.array_equal(data.train[0][..., 1].ravel(), first[1024:2048])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_malicious_batch_runs_nothing(tmp_path):
    write_cifar10(tmp_path / 'cifar-10-batches-py')
    victim = tmp_path / 'written by the pickle'
    (tmp_path / 'cifar-10-batches-py' / 'data_batch_3').write_bytes(
        pickle.dumps({'data': Malicious(victim), 'labels': []}))
    refused(tmp_path, r'data_batch_3.*asks for (io|_io)\.open')
    assert not victim.exists()
    pickle.loads((tmp_path / 'cifar-10-batches-py' / 'data_batch_3').read_bytes())['data'].close()
    assert victim.exists()  # it would have


@pytest.mark.parametrize('content', [
    b'', b'not a pickle', batch_as_published(np.zeros((4, 3072), np.uint8), [0] * 4)[:-600],
    pickle.dumps({'data': [1, 2], 'labels': [0, 1]}), pickle.dumps([1]), pickle.dumps({'labels': []}),
    written_today(np.zeros((2, 100), np.uint8), [0, 0]), written_today(np.zeros((2, 3072)), [0, 0]),
    written_today(np.zeros((2, 3072), np.uint8), [0]),
    written_today(np.asfortranarray(np.ones((2, 3072), 'u1')), [0, 0]),
], ids=['empty', 'text', 'cut off', 'no array', 'no dict', 'no data', 'shape', 'float', 'labels', 'columns'])
def test_damaged_batch_is_refused(tmp_path, content):
    write_cifar10(tmp_path / 'cifar-10-batches-py')
    (tmp_path / 'cifar-10-batches-py' / 'data_batch_2').write_bytes(content)
    refused(tmp_path, 'data_batch_2')


def test_incomplete_cifar10_is_refused(tmp_path):
    write_cifar10(tmp_path / 'cifar-10-batches-py')
    (tmp_path / 'cifar-10-batches-py' / 'test_batch').unlink()
    refused(tmp_path, 'test_batch')


def test_cifar10_labels_out_of_range(tmp_path):
    write_cifar10(tmp_path / 'cifar-10-batches-py')
    (tmp_path / 'cifar-10-batches-py' / 'test_batch').write_bytes(
        written_today(np.zeros((2, 3072), np.uint8), [3, 10]))
    refused(tmp_path, 'test images .* labels from 3 to 10; its 10 classes are 0 to 9')


# -- Fashion-MNIST ----------------------------------------------------------------------------------------------------

def idx(values):
    return struct.pack(f'>HBB{values.ndim}I', 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def write_fashion(folder, compress=True):
    folder.mkdir(parents=True)
    content = {}
    for part, count in (('train', 100), ('t10k', 20)):
        for what, values in (
                ('images-idx3', RNG.integers(0, 256, (count, 28, 28))), ('labels-idx1', np.arange(count) % 10)):
            content[f'{part}-{what}'] = values
            data = idx(values)
            name = f'{part}-{what}-ubyte'
            (folder / (f'{name}.gz' if compress else name)).write_bytes(gzip.compress(data) if compress else data)
    return content


@pytest.mark.parametrize('place,compress', [('', True), ('FashionMNIST/raw', True), ('raw', False)])
def test_fashion_mnist(tmp_path, place, compress):
    content = write_fashion(tmp_path / 'root' / place, compress)
    data = load_data(tmp_path / 'root')
    assert (data.tag, data.classes[9], data.train.in_chans) == ('fashion_mnist', 'Ankle boot', 1)
    assert [split.images.shape for split in (data.train, data.val, data.test)] == [
        (90, 28, 28, 1), (10, 28, 28, 1), (20, 28, 28, 1)]
    assert np.array_equal(data.test.images[..., 0], content['t10k-images-idx3'])
    assert np.array_equal(data.test.labels, content['t10k-labels-idx1'])


def test_damaged_fashion_mnist_is_refused(tmp_path):
    write_fashion(tmp_path / 'set')
    images, labels = (tmp_path / 'set' / f'train-{what}-ubyte.gz' for what in ('images-idx3', 'labels-idx1'))
    good = labels.read_bytes()
    labels.write_bytes(gzip.compress(idx(np.arange(99) % 10)))
    refused(tmp_path / 'set', '100 images but 99 labels')
    labels.write_bytes(gzip.compress(idx(np.arange(100) % 11)))
    refused(tmp_path / 'set', 'labels from 0 to 10')
    labels.write_bytes(images.read_bytes())
    refused(tmp_path / 'set', 'labels-idx1.*magic')
    labels.write_bytes(good[:-8])
    refused(tmp_path / 'set', 'train-labels-idx1')
    labels.write_bytes(good[:20] + b'\xff' * 20)
    refused(tmp_path / 'set', 'train-labels-idx1')
    labels.unlink()
    refused(tmp_path / 'set', 'train-labels-idx1')


# -- image folders ----------------------------------------------------------------------------------------------------

def write_folder(root, counts, size=(20, 12)):
    """Class folders of one colour a class; `counts` is {class: images}."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new('RGB', size, (60 * number, 200, index)).save(root / name / f'{index}.png')


def test_folder(tmp_path):
    write_folder(tmp_path / 'My set', {'cat': 20, 'dog': 30, 'owl': 5})
    data = load_data(tmp_path / 'My set', val_share=0.2)
    assert (data.name, data.tag, data.classes) == ('My set', 'my_set', ('cat', 'dog', 'owl'))
    assert np.bincount(data.train.labels).tolist() == [16, 24, 4]
    assert np.bincount(data.val.labels).tolist() == [4, 6, 1] and data.test is None
    assert not set(data.train.images) & set(data.val.images)
    assert data.val.images == load_data(tmp_path / 'My set', val_share=0.2).val.images
    for split in (data.train, data.val):
        for image, label in zip(split, split.labels):
            assert image.shape == (12, 20, 3) and image[0, 0, 0] == 60 * label
    grey = load_data(tmp_path / 'My set', in_chans=1)
    assert grey.train[0].shape == (12, 20, 1) and grey.train.native_side is None


def test_folder_with_splits(tmp_path):
    for split, counts in (('train', {'a': 3, 'b': 4}), ('valid', {'a': 1, 'b': 2}), ('test', {'b': 2})):
        write_folder(tmp_path / split, counts)
    data = load_data(tmp_path)
    assert [split.labels.tolist() for split in (data.train, data.val, data.test)] == [
        [0, 0, 0, 1, 1, 1, 1], [0, 1, 1], [1, 1]]
    write_folder(tmp_path / 'test', {'c': 1})
    refused(tmp_path, "classes that .*train' has not: c")


def test_folder_turns_pictures_upright(tmp_path):
    write_folder(tmp_path, {'a': 1, 'b': 1})
    picture = Image.new('RGB', (20, 12))
    exif = Image.Exif()
    exif[0x112] = 6  # orientation: a quarter turn
    picture.save(tmp_path / 'a' / '0.png', exif=exif)
    assert load_data(tmp_path).train[0].shape == (20, 12, 3)  # as the pipeline will see it


def test_bad_folders_are_refused(tmp_path):
    refused(tmp_path / 'nowhere', "nowhere' does not exist")
    (tmp_path / 'notes.txt').write_text('hello')
    refused(tmp_path / 'notes.txt', 'file of another kind')
    (tmp_path / 'empty').mkdir()
    refused(tmp_path / 'empty', "empty' has 0 class folders; at least two")
    write_folder(tmp_path / 'one', {'a': 3})
    refused(tmp_path / 'one', "one' has 1 class folders; at least two")
    write_folder(tmp_path / 'void', {'a': 3, 'b': 0})
    refused(tmp_path / 'void', "'.*void/b' holds no pictures")


def test_corrupt_image_is_found_before_training(tmp_path):
    write_folder(tmp_path, {'a': 4, 'b': 4}, size=(60, 60))
    noise = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(noise, 'JPEG')
    (tmp_path / 'b' / '9.jpg').write_bytes(noise.getvalue()[:-500])
    refused(tmp_path, re.escape(str(tmp_path / 'b' / '9.jpg')) + "' is damaged or incomplete")
    (tmp_path / 'a' / '7.png').write_text('no picture')
    refused(tmp_path, r"a/7\.png' is not a picture.*1 more of")
    assert len(load_data(tmp_path, check=False).train) == 10  # too little for a validation split


# -- splits and augmentation ------------------------------------------------------------------------------------------

def make_data():
    sets = [ImageSet(RNG.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), np.arange(n) % 2) for n in (10, 4, 6)]
    return ImageData('noise', 'noise', ('a', 'b'), *sets)


def test_validation_split():
    data = make_data()
    assert data.with_validation_on('val') is data
    other = data.with_validation_on('test')
    assert len(other.train) == 14 and other.val is data.test
    assert data.with_validation_on('none').val is None
    with pytest.raises(InputError, match='one of val, test, none'):
        data.with_validation_on('train')
    with pytest.raises(InputError, match='no test split'):
        ImageData('n', 'n', ('a', 'b'), data.train).with_validation_on('test')


def test_images_and_labels_must_match():
    with pytest.raises(InputError, match='3 images but 2 labels'):
        ImageSet(np.zeros((3, 8, 8, 3), np.uint8), [0, 1])


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('policy', AUGMENTATIONS)
def test_augmentation_is_a_function_of_seed_epoch_and_index(policy, channels):
    images = ImageSet(RNG.integers(0, 256, (6, 32, 32, channels), dtype=np.uint8), range(6))
    keys = [(epoch, index, 32) for epoch in (0, 1) for index in range(6)]
    one, other = (AugmentedSet(images, policy, seed=3) for _ in range(2))
    first = {key: one[key] for key in keys}
    for key in reversed(keys):  # in any order
        image, label = other[key]
        assert image.shape == (channels, 32, 32) and label == key[1]
        assert np.array_equal(image, first[key][0])

    def differ(samples):
        return sum(not np.array_equal(samples[key][0], first[key][0]) for key in keys)
    another_seed = AugmentedSet(images, policy, seed=4)
    assert (differ({key: another_seed[key] for key in keys}) > 6) == (policy != 'none')
    assert (differ({key: first[(1 - key[0], *key[1:])] for key in keys}) > 6) == (policy != 'none')


def test_files_are_augmented_to_the_side(tmp_path):
    write_folder(tmp_path, {'a': 2, 'b': 2}, size=(50, 30))
    data = load_data(tmp_path)
    for policy in AUGMENTATIONS:
        assert AugmentedSet(data.train, policy)[0, 0, 24][0].shape == (3, 24, 24)


def test_unknown_augmentation():
    with pytest.raises(InputError, match='none, light, medium, heavy'):
        make_augmentation('strong', (8, 8), True)
