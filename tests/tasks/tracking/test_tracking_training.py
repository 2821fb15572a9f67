"""Loss, samples and recipes of a tracker, and the evaluation that a run ends with."""
import json
import math

import numpy as np
import pytest
import torch

from vishub import InputError
from vishub.models.bactrack import TrackerOutput
from vishub.tasks.tracking.constants import CHOICES
from vishub.tasks.tracking.data import GeneratedScenes, PairSamples, TrackingData, load_data
from vishub.tasks.tracking.metrics import evaluate, measure, run_sequence, save_evaluation, save_results, update_card
from vishub.tasks.tracking.peers import FirstBox, TemplateMatching, peers
from vishub.tasks.tracking.scenes import NoiseTextures, Scene
from vishub.tasks.tracking.training import TrackingRecipe, positive_tokens, tracking_loss
from vishub.training import TrainConfig, train


def toy_data():
    noise = NoiseTextures()
    return TrackingData(
        name='toy scenes', tag='toy', train=GeneratedScenes(noise, 8, 60, seed=0, fade=None),
        val=GeneratedScenes(noise, 4, 12, seed=1, fade=None), radius=8, split='2 scenes of 5 frames',
        test=[Scene(noise, (7, number), 5, name=f's{number}') for number in (0, 1)])


# ---- loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('box, rows, columns', [
    ((0.5, 0.5, 0.5, 0.25), [2], [1, 2]),  # x from 0.25 to 0.75 of 4: ceil 1 to ceil 3 - 1; y from 0.375: 2 to 2
    ((0.5, 0.5, 0.02, 0.02), [2], [2]),  # at least one
    ((0., 1., 0.2, 0.2), [3], [0]),  # clipped to the grid
    ((1.4, 0.5, 0.2, 1.), [0, 1, 2, 3], [3]),
])
def test_positive_tokens(box, rows, columns):
    found = positive_tokens(torch.tensor([box]), (4, 4)).unflatten(1, (4, 4))[0]
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[np.ix_(rows, columns)] = True
    assert torch.equal(found, expected)


def test_loss_by_hand():
    grid, true = (1, 2), torch.tensor([[0.75, 0.5, 0.5, 1.]])  # the second token is the target's
    logits = torch.tensor([[[0., 0.], [math.log(3), 0.]]])
    boxes = torch.tensor([[[0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.5, 1.]]])  # a quarter to the left: IoU 1/3, hull 3/4
    output = TrackerOutput(logits, boxes, torch.zeros(1))
    ce = (math.log(2) / 16 + math.log(4 / 3)) / (1 + 1 / 16)
    giou = 1 - (1 / 3 - 0)
    assert float(tracking_loss(output, true, grid)) == pytest.approx(8.334 * ce + 5 * 0.25 + 2 * giou, rel=1e-5)


# ---- samples --------------------------------------------------------------------------------------------------------


def test_samples_are_functions_of_their_key():
    samples = PairSamples(GeneratedScenes(NoiseTextures(), 6, 160, fade=None), 3, 48, 96)
    first, again, other = samples[0, 2, 96], samples[0, 2, 96], samples[1, 2, 96]
    assert first['templates'].shape == (3, 3, 48, 48) and first['search'].shape == (3, 96, 96)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first['search'], other['search'])


def test_boxes_of_samples_lie_on_the_target():
    class Bright:
        name = 'bright'

        def __len__(self):
            return 50

        def box(self, number):
            return np.array([30. + number, 40., 20., 14.])

        def frame(self, number):
            image = np.zeros((100, 140, 3), np.uint8)
            image[40:54, 30 + number:50 + number] = 250
            return image

    class One(GeneratedScenes):
        def video(self, index, epoch=0):
            return Bright()

    samples = PairSamples(One(NoiseTextures(), 40), 2, 48, 96)
    seen = 0
    for index in range(40):
        sample = samples[0, index, 96]
        bright = sample['search'].float().mean(0) > 90
        if not bright.any() or bright[0].any() or bright[-1].any() or bright[:, 0].any() or bright[:, -1].any():
            continue  # cut off at the border
        seen += 1
        rows, columns = torch.nonzero(bright.any(1)).flatten(), torch.nonzero(bright.any(0)).flatten()
        x, y, w, h = (sample['box'] * 96).tolist()
        assert columns[0] == pytest.approx(x - w / 2, abs=1.6) and columns[-1] + 1 == pytest.approx(x + w / 2, abs=1.6)
        assert rows[0] == pytest.approx(y - h / 2, abs=1.6) and rows[-1] + 1 == pytest.approx(y + h / 2, abs=1.6)
        assert (sample['templates'][:, :, 20:28, 20:28] > 90).all()  # templates are centred
    assert seen > 10


def test_absent_targets():
    scenes = GeneratedScenes(NoiseTextures(), 30, 60, fade=None)
    present = [bool(PairSamples(scenes, 1, 48, 96, absent=0.5)[0, index, 96]['present']) for index in range(30)]
    assert 6 < sum(present) < 24
    assert all(PairSamples(scenes, 1, 48, 96)[0, index, 96]['present'] for index in range(8))


# ---- recipes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Both stages for two steps each: their folders of weights."""
    root = tmp_path_factory.mktemp('runs')
    folders = []
    for stage in (1, 2):
        recipe = TrackingRecipe(
            'bactrack_tiny', toy_data(), stage=stage, start=folders[0] if folders else None, num_templates=2,
            command='vishub train tracking')
        config = TrainConfig(
            root / f'stage{stage}', ((96, 1),), batch_size=4, lr=1e-3, num_threads=1, progress=False, device='cpu')
        folders.append(train(recipe, config).folder)
    return folders


def test_stages_and_their_weights(runs):
    from safetensors.torch import load_file

    first, second = runs
    assert first.name == 'bactrack_tiny.toy_stage1' and second.name == 'bactrack_tiny.toy'
    before, after = (load_file(folder / 'model.safetensors') for folder in runs)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # stage 2 moves the discriminator and nothing else, batch norms' statistics included
    assert changed and all(name.startswith('discriminator.') for name in changed)
    assert 'not measured' in (first / 'README.md').read_text(encoding='utf-8').lower()
    facts = json.loads((second / 'metrics.json').read_text(encoding='utf-8'))
    assert facts['training']['started_from']['name'] == first.name
    assert facts['num_test'] == 2 and facts['report']['protocol'] == 'pysot' and facts['report']['radius'] == 8
    names = [peer['name'] for peer in facts['peers']]
    assert names[:3] == ['bactrack_tiny.toy, latest', 'bactrack_tiny.toy, none', 'first box kept']
    card = (second / 'README.md').read_text(encoding='utf-8')
    assert 'BACTrack-style' in card and 'not a reproduction' in card
    chosen = facts['training']['constants']['chosen']  # on validation scenes, and the weights carry it
    config = json.loads((second / 'config.json').read_text(encoding='utf-8'))
    assert config['pretrained_cfg']['tracking'] == chosen and set(chosen) == {name for name, _ in CHOICES}
    assert (second / 'track.png').is_file() and (second / 'curves.png').is_file()


def test_stage_one_leaves_the_discriminator_alone():
    recipe = TrackingRecipe('bactrack_tiny', toy_data())
    model = recipe.build_model()
    trained = {name.split('.')[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {'backbone', 'input_proj', 'type_embed', 'blocks', 'norm', 'cls_head', 'reg_head'}


def test_number_of_templates_varies_in_training():
    recipe = TrackingRecipe('bactrack_tiny', toy_data(), num_templates=3)
    batch = {'templates': torch.zeros(2, 3, 3, 48, 48, dtype=torch.uint8),
             'search': torch.full((2, 3, 96, 96), 255, dtype=torch.uint8), 'box': torch.zeros(2, 4),
             'present': torch.ones(2, dtype=torch.bool)}
    with torch.random.fork_rng():
        counts = {recipe.prepare(batch, 96, True)[0][0].shape[1] for _ in range(40)}
    assert counts == {1, 2, 3}
    (templates, search), _ = recipe.prepare(batch, 96, False)
    assert templates.shape[1] == 3
    assert search[0, :, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])


def test_sizes_are_calibrated():
    recipe = TrackingRecipe('bactrack_tiny', toy_data(), num_templates=1)
    samples = recipe.samples(recipe.data.val, augment=False)
    true = torch.stack([samples[0, index, 96]['box'] for index in range(4)])

    class Boxes(torch.nn.Module):
        """Finds every target's centre, and a box twice as wide and half as high as the bias says."""

        def __init__(self):
            super().__init__()
            self.reg_head = torch.nn.Sequential(torch.nn.Linear(1, 4))
            with torch.no_grad():
                self.reg_head[-1].bias.copy_(torch.logit(true.median(0).values * torch.tensor([1, 1, 1.4, 0.8])))

        def forward(self, templates, search):
            boxes = self.reg_head[-1].bias.sigmoid().expand(len(search), 1, 4).clone()
            boxes[:, 0, :2] = true[:len(search), :2]
            logits = torch.tensor([1., 0.]).expand(len(search), 1, 2)
            return TrackerOutput(logits, boxes, torch.zeros(len(search)))

    model = Boxes()
    width, height = recipe.calibrate_sizes(model)
    assert width > 1 > height
    again = recipe.calibrate_sizes(model)  # now half are too large and half too small
    assert again == pytest.approx((1, 1), abs=0.1)


@pytest.mark.parametrize('options, sentence', [
    (dict(stage=3), 'stage is 3'), (dict(stage=2), 'give its folder'), (dict(num_templates=0), 'num_templates is 0'),
    (dict(model='favit_b2'), 'tracks nothing'), (dict(model='bactrack_giant'), 'bactrack_tiny'),
    (dict(stage=2, start='nowhere'), 'no config.json'), (dict(model_args={'depth': 'two'}), 'refuses its arguments'),
])
def test_bad_recipes(options, sentence):
    with pytest.raises((InputError, ValueError), match=sentence):
        TrackingRecipe(**{'model': 'bactrack_tiny', 'data': toy_data(), **options})


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_perfect_and_lazy_trackers():
    data = toy_data()
    videos = data.test

    class Perfect:
        def __init__(self, video):
            self.video, self.number = video, 0

        def init(self, image, box):
            self.number = 0

        def update(self, image):
            self.number += 1
            return self.video.box(self.number), 1.

    runs = [run_sequence(Perfect(video), video) for video in videos]
    metrics = measure(runs, videos, data)['metrics']
    assert metrics['auc'] == pytest.approx(20 / 21, abs=1e-4)  # overlap 1 is not above 1
    assert metrics['precision'] == metrics['success_rate'] == metrics['late_iou'] == 1 and metrics['fps'] > 0
    lazy = measure([run_sequence(FirstBox(), video) for video in videos], videos, data)['metrics']
    assert lazy['auc'] < metrics['auc']


def test_template_matching_follows_what_does_not_change():
    frames = np.random.default_rng(0).integers(0, 90, (10, 80, 100, 3), np.uint8)
    patch = np.random.default_rng(1).integers(100, 255, (12, 16, 3), np.uint8)
    tracker = TemplateMatching()
    for number, frame in enumerate(frames):
        frame[20 + 2 * number:32 + 2 * number, 10 + 3 * number:26 + 3 * number] = patch
        if number == 0:
            tracker.init(frame, (10, 20, 16, 12))
        else:
            box, score = tracker.update(frame)
            assert box.tolist() == [10 + 3 * number, 20 + 2 * number, 16, 12] and score > 0.99


def test_every_peer_runs(scene, clip):
    made = peers()
    assert {'first box kept', 'template matching (NCC)'} <= set(made)
    for make in made.values():
        tracker = make()
        tracker.init(clip[0], scene.box(0))
        box, _ = tracker.update(clip[1])
        assert box.shape == (4,) and np.isfinite(box).all()


def test_evaluation_of_a_folder_of_weights(runs, tmp_path):
    told = []
    report = evaluate([str(runs[1])], toy_data(), limit=1, device='cpu', results=tmp_path / 'results',
                      progress=lambda done, total: told.append((done, total)))
    trackers = 1 + len(report['peers'])
    assert told[-1] == (trackers * 5, trackers * 5) and report['num_test'] == 1 and report['report']['frames'] == 5
    json.dumps(report)
    boxes = np.loadtxt(tmp_path / 'results' / 'first box kept' / 's0.txt', delimiter=',')
    np.testing.assert_allclose(boxes, np.tile(toy_data().test[0].box(0), (5, 1)))
    assert len((tmp_path / 'results' / 'first box kept' / 'times' / 's0_time.txt').read_text().split()) == 5
    files = save_evaluation(report, tmp_path)
    assert all(file.stat().st_size > 1000 for file in files)
    update_card(runs[1], report)
    assert json.loads((runs[1] / 'metrics.json').read_text(encoding='utf-8'))['num_test'] == 1
    with pytest.raises(InputError, match='belong elsewhere'):
        update_card(runs[1], {**report, 'data': 'other scenes'})


def test_result_files_of_got10k(tmp_path):
    run = run_sequence(FirstBox(), toy_data().test[0])._replace(name='val/GOT-10k_Val_000001')
    save_results([run], tmp_path, 'GOT-10k')
    lines = (tmp_path / 'GOT-10k_Val_000001' / 'GOT-10k_Val_000001_001.txt').read_text().splitlines()
    assert len(lines) == 5 and all(len(word.split('.')[1]) == 3 for word in lines[0].split(','))
    assert (tmp_path / 'GOT-10k_Val_000001' / 'GOT-10k_Val_000001_time.txt').is_file()


def test_what_cannot_be_evaluated(runs, tmp_path):
    with pytest.raises(InputError, match='batch_size is 4'):
        evaluate([str(runs[1])], toy_data(), batch_size=4)
    with pytest.raises(InputError, match='two models are called'):
        evaluate([str(runs[1])] * 2, toy_data(), device='cpu')
    with pytest.raises(InputError, match='no sequence with true boxes'):
        evaluate([str(runs[1])], TrackingData(name='nothing', tag='nothing'), device='cpu')


def test_folder_layout_by_the_command_line(runs, tmp_path):
    from PIL import Image
    from typer.testing import CliRunner

    from vishub.cli import app

    scene = toy_data().test[0]
    place = tmp_path / 'DTB' / 'Car'
    (place / 'img').mkdir(parents=True)
    for number in range(5):
        Image.fromarray(scene.frame(number)).save(place / 'img' / f'{number:05d}.png')
    (place / 'groundtruth_rect.txt').write_text(
        '\n'.join(','.join(map(str, scene.box(number))) for number in range(5)))
    assert load_data(tmp_path / 'DTB').layout == 'DTB70'
    answer = CliRunner().invoke(
        app, ['evaluate', str(runs[1]), '--data', str(tmp_path / 'DTB'), '--device', 'cpu', '--json'])
    assert answer.exit_code == 0, answer.output
    report = json.loads(answer.stdout)
    assert report['data'] == 'DTB70 (DTB)' and report['report']['radius'] == 20 and 'pysot' in report['split']
    words = ['predict', f'local-dir:{runs[1]}', str(place / 'img'), '--option', 'box=10,10,20,20']
    answer = CliRunner().invoke(app, [*words, '--device', 'cpu', '--json'])
    assert answer.exit_code == 0 and json.loads(answer.stdout)[0]['num_frames'] == 5
