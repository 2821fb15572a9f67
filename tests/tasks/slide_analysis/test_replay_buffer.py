"""The buffer of earlier regions: its bound, what stays in it, and its file."""
import pytest
import torch

from vishub import InputError
from vishub.tasks.slide_analysis.buffer import ReplayBuffer


def _features(count, value=0.):
    return torch.full((count, 4, 4, 3), float(value)), torch.full((count, 3), float(value))


def _offer(buffer, count, label, task=0, rng=None, first=0):
    """Regions numbered first, first + 1, … in their features."""
    patch, region = _features(count)
    numbers = torch.arange(first, first + count).float()
    buffer.add_regions(patch + numbers[:, None, None, None], region + numbers[:, None], label, task, rng)


def test_reservoir_is_bounded_and_fair():
    counts = torch.zeros(200)
    for seed in range(150):
        buffer, rng = ReplayBuffer(20), torch.Generator().manual_seed(seed)
        for start in range(0, 200, 25):
            _offer(buffer, 25, start // 100, rng=rng, first=start)
            assert len(buffer) == min(20, start + 25)
        assert buffer.seen == 200
        counts[buffer.region[:, 0].long()] += 1
        assert torch.equal(buffer.label, (buffer.region[:, 0] >= 100).long())
        assert torch.equal(buffer.patch[:, 0, 0, 0], buffer.region[:, 0])
    # each of 200 stays with probability 1/10: early and late ones alike
    assert abs(counts[:100].sum() / counts.sum() - 0.5) < 0.04 and counts.max() < 40


def test_pseudo_slides_are_of_one_class_and_without_repetition():
    buffer, rng = ReplayBuffer(30), torch.Generator().manual_seed(0)
    _offer(buffer, 12, label=0, rng=rng)
    _offer(buffer, 6, label=1, rng=rng, first=100)
    torch.manual_seed(0)
    patch, region = buffer.pseudo_slide(0, 8)
    assert patch.shape == (8, 4, 4, 3) and patch.dtype == torch.float32
    assert len(region[:, 0].unique()) == 8 and (region < 100).all()
    assert len(buffer.pseudo_slide(1, 50)[1]) == 6
    assert buffer.pseudo_slide(7, 3) is None
    _offer(buffer, 1, label=1, rng=rng, first=200)  # what is remembered of classes is renewed
    assert len(buffer.pseudo_slide(1, 50)[1]) == 7


def test_whole_slides_stay_whole_and_balanced():
    buffer, rng = ReplayBuffer(20), torch.Generator().manual_seed(0)
    for number in range(12):
        patch, region = _features(4, number)
        buffer.add_slide(patch, region, int(number >= 9), 0, torch.tensor([number, 1.]), rng)
        assert len(buffer) <= 20
    sizes = torch.bincount(buffer.slide)
    assert (sizes == 4).all() and len(sizes) == len(buffer.logits) == 5
    assert buffer.label.bincount().tolist() in ([8, 12], [12, 8])  # three of class 1 came, against nine of class 0
    for slide in range(5):
        mine = buffer.slide == slide
        assert len(buffer.region[mine].unique()) == 1 and buffer.logits[slide, 0] == buffer.region[mine][0, 0]
    patch, region, label, logits = buffer.stored_slide()
    assert len(region) == 4 and logits[0] == region[0, 0] and label == int(logits[0] >= 9)
    grown = torch.tensor([20., 1., 2., 3.])
    buffer.add_slide(*_features(4, 20), 2, 1, grown, rng)
    assert buffer.logits.shape[1] == 4 and torch.equal(buffer.logits[-1], grown)
    buffer.add_slide(*_features(50, 21), 3, 1, grown, rng)
    assert len(buffer) == 20


def test_file_is_within_its_bound_and_comes_back(tmp_path):
    buffer, rng = ReplayBuffer(50), torch.Generator().manual_seed(0)
    _offer(buffer, 70, label=0, rng=rng)
    buffer.done.append('organ')
    path = tmp_path / 'buffer.safetensors'
    buffer.save(path)
    assert path.stat().st_size <= buffer.most_bytes(4, 3, 8) and buffer.nbytes < path.stat().st_size
    loaded = ReplayBuffer.load(path)
    assert (loaded.seen, loaded.done, loaded.capacity, len(loaded)) == (70, ['organ'], 50, 50)
    assert torch.equal(loaded.patch, buffer.patch) and torch.equal(loaded.label, buffer.label)
    _offer(loaded, 5, label=1, rng=rng)  # what was loaded can be written to
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match='is no buffer'):
        ReplayBuffer.load(path)


def test_refusals():
    with pytest.raises(InputError, match='cannot hold one of each of 8 classes'):
        ReplayBuffer(7, 8)
    buffer, rng = ReplayBuffer(5), torch.Generator()
    _offer(buffer, 2, 0, rng=rng)
    with pytest.raises(InputError, match='use the encoder and grid'):
        buffer.add_regions(torch.zeros(1, 8, 8, 3), torch.zeros(1, 3), 0, 0, rng)
