"""Windows, grids, grey values, losses, made volumes: each against its definition."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from tests.models.official_weights import load_case
from vishub import InputError
from vishub.tasks.volume_segmentation.loss import (
    SegmentationLoss,
    dice_loss,
    region_tversky_loss,
    supervision_weights,
)
from vishub.tasks.volume_segmentation.preprocessing import (
    Preprocessing,
    foreground_statistics,
    planes_to_grid,
    resample,
    resample_labels,
)
from vishub.tasks.volume_segmentation.procedural import procedural_volume
from vishub.tasks.volume_segmentation.sliding_window import gaussian_window, sliding_planes, window_starts

# Windows


def test_window_starts():
    assert window_starts(110, 64) == [0, 23, 46]
    assert window_starts(64, 64) == window_starts(10, 64) == [0]
    assert window_starts(65, 64) == [0, 1]
    for size, patch, overlap in ((200, 48, 0.5), (97, 32, 0.25), (600, 128, 0.5)):
        starts = window_starts(size, patch, overlap)
        assert starts[0] == 0 and starts[-1] == size - patch
        assert max(np.diff(starts)) <= (1 - overlap) * patch + 1


def test_gaussian_window_by_its_definition():
    patch = (16, 8, 12)
    impulse = np.zeros(patch)
    impulse[8, 4, 6] = 1
    expected = gaussian_filter(impulse, [p / 8 for p in patch], mode='constant', truncate=4)
    expected = (expected / expected.max()).astype(np.float32)
    expected[expected == 0] = expected[expected > 0].min()
    np.testing.assert_allclose(gaussian_window(patch).numpy(), expected, rtol=1e-4)


def brute_force(network, volume, patch, overlap):
    """All logits at once: what the planes must be."""
    starts = [window_starts(s, p, overlap) for s, p in zip(volume.shape[1:], patch)]
    weights = gaussian_window(patch)
    total = torch.zeros(2, *volume.shape[1:])
    norm = torch.zeros(volume.shape[1:])
    for d in starts[0]:
        for h in starts[1]:
            for w in starts[2]:
                place = (slice(d, d + patch[0]), slice(h, h + patch[1]), slice(w, w + patch[2]))
                total[(slice(None), *place)] += network(volume[(slice(None), *place)][None])[0] * weights
                norm[place] += weights
    return total / norm


@pytest.mark.parametrize('size', [(16, 16, 16), (29, 16, 20), (40, 37, 17)])
def test_planes_are_those_of_all_at_once(size):
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(1, 2, 5, padding=2)  # its windows differ where they overlap
    volume = torch.randn(1, *size)
    with torch.no_grad():
        expected = brute_force(conv, volume, (16, 16, 16), 0.5)
        seen = []
        planes = list(sliding_planes(
            conv, volume, (16, 16, 16), batch_size=3, advance=lambda done, total: seen.append((done, total))))
    assert len(planes) == size[0]
    torch.testing.assert_close(torch.stack(planes, 1), expected, rtol=1e-4, atol=1e-5)
    assert seen[-1][0] == seen[-1][1] == np.prod([len(window_starts(s, 16)) for s in size])


def test_a_small_volume_is_padded_and_mirrors_are_averaged():
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(1, 2, 3, padding=1)
    volume = torch.randn(1, 5, 20, 7)
    with torch.no_grad():
        planes = torch.stack(list(sliding_planes(conv, volume, (8, 8, 8))), 1)
        assert planes.shape == (2, 5, 20, 7)
        mirrored = torch.stack(list(sliding_planes(conv, volume, (8, 8, 8), mirror=True)), 1)
        flipped = torch.stack(list(sliding_planes(conv, volume.flip(1, 3), (8, 8, 8), mirror=True)), 1)
        padded = F.pad(volume, (0, 1, 0, 0, 1, 2))
        torch.testing.assert_close(planes, brute_force(conv, padded, (8, 8, 8), 0.5)[:, 1:6, :, :7])
    torch.testing.assert_close(mirrored[:, 1:4, 6:14, 2:5], flipped.flip(1, 3)[:, 1:4, 6:14, 2:5], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(mirrored, planes, atol=1e-3)


def test_what_is_held_is_one_patch_deep():
    """The planes come while later windows have not run yet."""
    calls = []

    def network(x):
        calls.append(len(x))
        return torch.cat([x, x], 1)

    planes = sliding_planes(network, torch.randn(1, 64, 8, 8), (8, 8, 8))
    for _ in range(4):
        next(planes)
    assert len(calls) == 1


# Grids and grey values


def test_planes_to_grid_is_linear_interpolation():
    torch.manual_seed(0)
    for depth, size in ((6, (11, 9, 5)), (9, (4, 7, 7)), (1, (3, 4, 4)), (5, (5, 8, 8))):
        logits = torch.randn(2, depth, 8, 8)
        planes = list(planes_to_grid(logits.unbind(1), depth, size))
        expected = F.interpolate(logits[None], size=size, mode='trilinear', align_corners=False)[0]
        torch.testing.assert_close(torch.stack(planes, 1), expected, rtol=1e-4, atol=1e-5)


def test_resample_keeps_smooth_things_in_place():
    axes = np.meshgrid(*(np.linspace(-1, 1, 2 * n + 1)[1::2] for n in (20, 24, 16)), indexing='ij')
    smooth = lambda d, h, w: np.sin(2 * d) + h * w  # noqa: E731
    data = smooth(*axes)[None].astype(np.float32)
    out = resample(data, (30, 18, 33), (1, 1, 1))
    fine = np.meshgrid(*(np.linspace(-1, 1, 2 * n + 1)[1::2] for n in (30, 18, 33)), indexing='ij')
    assert out.shape == (1, 30, 18, 33) and out.dtype == np.float32
    np.testing.assert_allclose(out[0, 4:-4, 4:-4, 4:-4], smooth(*fine)[4:-4, 4:-4, 4:-4], atol=2e-3)
    np.testing.assert_array_equal(resample(data, data.shape[1:], (1, 1, 1)), data)
    # thick slices are taken, not mixed
    thick = resample(data, (40, 24, 16), (5, 1, 1))
    np.testing.assert_array_equal(thick[0, ::2], data[0])
    labels = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    np.testing.assert_array_equal(resample_labels(labels, (6, 3, 3))[::2], labels)


def test_schemes():
    rng = np.random.default_rng(0)
    data = rng.normal(40, 8, (2, 6, 7, 8)).astype(np.float32)
    plain = Preprocessing().normalise(data)
    np.testing.assert_allclose([plain.mean((1, 2, 3)), plain.std((1, 2, 3))], [[0, 0], [1, 1]], atol=1e-4)
    data[:, :3] = 0
    cut = Preprocessing('zscore_nonzero').normalise(data)
    assert not cut[:, :3].any()
    np.testing.assert_allclose([cut[:, 3:].mean((1, 2, 3)), cut[:, 3:].std((1, 2, 3))], [[0, 0], [1, 1]], atol=1e-4)
    ct = Preprocessing('ct', low=-100, high=200, mean=50, std=25)
    np.testing.assert_allclose(ct.normalise(np.array([[[[-1000., 50, 3000]]]], np.float32)).ravel(), [-6, 0, 6])
    assert Preprocessing.from_dict(ct.to_dict()) == ct and Preprocessing.from_dict({}) == Preprocessing()
    plan = Preprocessing('zscore', (2, 1, 1))
    assert plan.size((10, 20, 30), (1, 1, 0.5)) == (5, 20, 15)
    assert plan.prepare(rng.normal(size=(1, 10, 20, 30)).astype(np.float32), (1, 1, 0.5)).shape == (1, 5, 20, 15)
    figures = foreground_statistics(np.arange(1001.))
    assert figures['low'] == 5 and figures['high'] == 995 and figures['mean'] == 500
    for wrong in (dict(intensity='none'), dict(spacing=(1, 0, 1)), dict(intensity='ct')):
        with pytest.raises(InputError):
            Preprocessing(**wrong)


# Losses


def test_golden_losses():
    case = load_case('mambaclinix', 'losses_b2_c3_r8x8x14')
    t = case.inputs['target'][:, 0]
    target = (t > 0.3).long() + (t > 1.0).long()
    logits = case.inputs['logits'].requires_grad_()
    ce, dice = F.cross_entropy(logits, target), dice_loss(logits, target, batch_dice=True)
    region = region_tversky_loss(logits, target, batch_dice=True)
    compound = SegmentationLoss(batch_dice=True)(logits, target)
    for name, value in (('ce', ce), ('dice', dice), ('region_tversky', region), ('compound', compound)):
        case.check(name, value, atol=1e-6)
    case.check('region_tversky_grad', torch.autograd.grad(region, logits)[0], atol=1e-9)
    case.check('compound_grad', torch.autograd.grad(compound, logits)[0], atol=1e-8)


def test_region_tversky_by_its_worked_example():
    """One region, one foreground class: tp .5, fp .2, fn .1."""
    p = torch.tensor([0.5, 0.2, 0.1])  # probability of the class where it is, is not, is
    p = torch.tensor([1., 0.5 / 2, 0.5 / 2])  # any voxels with these means
    truth = torch.tensor([1, 0, 1])
    logits = torch.stack([(1 - p).clamp_min(1e-12).log(), p.log()])[None, :, None, None]
    tp, fp, fn = float((p * truth).mean()), float((p * (1 - truth)).mean()), float(((1 - p) * truth).mean())
    alpha, beta = 0.3 + 0.4 * fp / (fp + fn), 0.3 + 0.4 * fn / (fp + fn)
    expected = tp / (tp + alpha * fp + beta * fn)
    assert float(region_tversky_loss(logits, truth[None, None, None], (1, 1, 1))) == pytest.approx(-expected, abs=1e-4)
    a, b = 0.3 + 0.4 * (.2 + 1e-5) / (.3 + 1e-5), 0.3 + 0.4 * (.1 + 1e-5) / (.3 + 1e-5)
    assert (.5 + 1e-5) / (.5 + a * .2 + b * .1 + 1e-5) == pytest.approx(0.761423, abs=1e-6)  # the spec's own figures


def test_deep_supervision():
    assert supervision_weights(5) == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15, 0])
    assert supervision_weights(1) == [1.]
    torch.manual_seed(0)
    target = torch.randint(3, (1, 8, 8, 8))
    levels = [torch.randn(1, 3, s, s, s) for s in (8, 4, 2)]
    loss = SegmentationLoss((2, 2, 2))
    expected = 2 / 3 * loss.level(levels[0], target) + 1 / 3 * loss.level(levels[1], target[:, ::2, ::2, ::2])
    torch.testing.assert_close(loss(levels, target), expected)
    plain = F.cross_entropy(levels[0], target) + dice_loss(levels[0], target)
    torch.testing.assert_close(SegmentationLoss(None)(levels[0], target), plain)
    right = F.one_hot(target, 3).movedim(-1, 1) * 40.
    assert float(loss(right, target)) == pytest.approx(-1.8, abs=1e-3)


# Made volumes


def test_procedural_volumes():
    image, label = procedural_volume(32, (7, 1))
    again = procedural_volume(32, (7, 1))
    np.testing.assert_array_equal(image, again[0])
    np.testing.assert_array_equal(label, again[1])
    assert not np.array_equal(label, procedural_volume(32, (7, 2))[1])
    assert image.dtype == np.float32 and label.dtype == np.uint8 and image.shape == label.shape == (32,) * 3
    assert set(np.unique(label)) == {0, 1, 2}
    means = [image[label == kind].mean() for kind in range(3)]
    assert 0.1 < means[1] - means[0] < 0.5 and means[2] > means[1] + 0.1
    assert image[label == 0].std() == pytest.approx(0.16, abs=0.03)
