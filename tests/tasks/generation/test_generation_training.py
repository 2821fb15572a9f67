"""The recipe of generation: what it feeds the model, what the student gets from the teacher, and a run end to end."""
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.models.test_dit import randomised
from vishub import InputError
from vishub.catalog import UnknownNameError
from vishub.hub import save_folder
from vishub.tasks.classification.data import ImageData, ImageSet
from vishub.tasks.generation.data import PictureSet, centre_crop, from_pixels, to_pixels
from vishub.tasks.generation.diffusion import Diffusion, hybrid_loss
from vishub.tasks.generation.training import GenerationRecipe
from vishub.training import TrainConfig, train

NAMES = ('dark', 'light', 'grey')


def squares(count, seed=0, side=28):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    level = np.array([40, 200, 120])[labels][:, None, None, None]
    return ImageSet((level + rng.integers(-20, 20, (count, side, side, 1))).astype(np.uint8), labels)


def data(count=60):
    return ImageData('squares', 'squares', NAMES, squares(count), squares(6, 1), squares(6, 2))


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp('teacher') / 'dit_small28.squares'
    model = randomised(timm.create_model('dit_small28', depth=1, num_classes=3))
    save_folder(
        model, folder, metrics={}, card={}, dtype=torch.float32,
        pretrained_cfg=dict(label_names=NAMES, num_classes=3))
    return f'local-dir:{folder}'


def recipe(model='lit_small28', **kwargs):
    return GenerationRecipe(model, data(), model_args={'depth': 1}, **kwargs)


def a_batch(made, count=8):
    samples = [made.train_set()[0, index, 28] for index in range(count)]
    return torch.stack([pixels for pixels, _ in samples]), torch.tensor([label for _, label in samples])


# ---- data -------------------------------------------------------------------------------------------------------


def test_pixels_there_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = from_pixels(pixels)
    assert float(x.min()) == -1 and float(x.max()) == 1
    np.testing.assert_array_equal(to_pixels(x)[0, ..., 0], pixels[0, 0].numpy())
    assert to_pixels(torch.tensor([[[[-3., 7.]]]])).ravel().tolist() == [0, 255]


def test_short_epochs_go_through_all_pictures():
    samples = PictureSet(squares(10), seed=5, epoch_size=4)
    assert len(samples) == 4
    row = [samples.image_index(epoch, index) for epoch in range(5) for index in range(4)]
    assert sorted(row[:10]) == list(range(10)) and sorted(row[10:]) == list(range(10)) and row[:10] != row[10:]
    assert PictureSet(squares(10), seed=5, epoch_size=4).image_index(3, 1) == row[13]  # a function of the key
    with pytest.raises(InputError, match='1 to 10'):
        PictureSet(squares(10), epoch_size=11)


def test_flips_are_a_function_of_the_key():
    images = ImageSet(np.tile(np.arange(28, dtype=np.uint8), (6, 28, 1))[..., None], [0] * 6)
    samples = PictureSet(images, flip=True, seed=1)
    rows = [samples[epoch, index, 28][0][0, 0] for epoch in range(3) for index in range(6)]
    mirrored = [bool(row[0] > row[-1]) for row in rows]
    assert any(mirrored) and not all(mirrored)
    assert mirrored == [bool(samples[e, i, 28][0][0, 0, 0]) for e in range(3) for i in range(6)]


def test_pictures_of_files_are_cropped_in_the_middle():
    picture = Image.new('RGB', (400, 120), 'white')
    picture.paste((255, 0, 0), (140, 0, 260, 120))
    cropped = np.asarray(centre_crop(picture, 24))
    assert cropped.shape == (24, 24, 3)
    assert (cropped[:, 1:-1] == [255, 0, 0]).all()
    assert PictureSet(squares(2, side=40))[0, 1, 28][0].shape == (1, 28, 28)


# ---- what the model is fed --------------------------------------------------------------------------------------


def test_prepare_makes_noisy_pictures_and_drops_labels():
    made = recipe()
    pixels, labels = a_batch(made, 60)
    torch.manual_seed(0)
    (x, t, y), targets = made.prepare((pixels, labels), 28, training=True)
    diffusion = Diffusion()
    torch.testing.assert_close(targets['x_start'], from_pixels(pixels))
    torch.testing.assert_close(x, diffusion.add_noise(targets['x_start'], targets['noise'], t))
    # one timestep in each sixtieth of the schedule
    place, ordered = torch.arange(60), t.sort().values
    assert ((ordered + 1) * 60 > place * 1000).all() and (ordered * 60 < (place + 1) * 1000).all()
    assert set(y.tolist()) <= {0, 1, 2, 3} and 0 < int((y == 3).sum()) < 20
    torch.testing.assert_close(y[y != 3], labels[y != 3])
    assert targets['teacher'] is None
    output = torch.randn(60, 2, 28, 28)
    expected = hybrid_loss(diffusion, output, targets['x_start'], x, targets['noise'], t).total.mean()
    torch.testing.assert_close(made.loss(output, targets), expected)


def test_the_model_does_not_drop_labels_again():
    made = recipe()
    model = made.build_model().train()
    made.train_mode(model)
    y = torch.zeros(200, dtype=torch.int64)
    assert torch.equal(model.label_embed(y), model.label_embed.embedding_table.weight[:1].expand(200, -1))


def test_a_student_inherits_all_but_attention_and_learns_from_its_teacher(teacher):
    made = recipe(teacher=teacher, inherit=True)
    torch.manual_seed(1)
    model = made.build_model()
    theirs = made.teacher.state_dict()
    for name, value in model.state_dict().items():
        assert '.attn.' in name or torch.equal(value, theirs[name]), name
    assert 'all but the attention' in made.remarks()[0]
    assert not any(parameter.requires_grad for parameter in made.teacher.parameters())

    (x, t, y), targets = made.prepare(a_batch(made), 28, training=True)
    with torch.no_grad():
        torch.testing.assert_close(targets['teacher'], made.teacher(x, t, y))  # the same dropped labels
    # a student that says the same pays nothing more; one that differs pays as the paper weighs it
    plain = recipe()
    base = plain.loss(targets['teacher'], {**targets, 'teacher': None})
    torch.testing.assert_close(made.loss(targets['teacher'], targets), base)
    shifted = targets['teacher'].clone()
    shifted[:, 1:] += 2.
    torch.testing.assert_close(
        made.loss(shifted, targets) - plain.loss(shifted, {**targets, 'teacher': None}), torch.tensor(0.05 * 4.))
    shifted = targets['teacher'].clone()
    shifted[:, :1] += 2.
    torch.testing.assert_close(
        made.loss(shifted, targets) - plain.loss(shifted, {**targets, 'teacher': None}), torch.tensor(0.5 * 4.))


def test_a_dit_starts_from_all_of_its_teacher(teacher):
    made = recipe('dit_small28', teacher=teacher, inherit=True, noise_weight=0, variance_weight=0)
    model = made.build_model()
    assert all(torch.equal(value, made.teacher.state_dict()[name]) for name, value in model.state_dict().items())
    assert made.prepare(a_batch(made), 28, training=True)[1]['teacher'] is None


def test_refusals(teacher):
    with pytest.raises(InputError, match='give one'):
        recipe(inherit=True)
    with pytest.raises(InputError, match='0 or more'):
        recipe(noise_weight=-1)
    with pytest.raises(InputError, match='does not generate'):
        recipe('favit_b0')
    with pytest.raises(UnknownNameError, match='lit_small28'):
        recipe('lit_small27')
    with pytest.raises(InputError, match='4 channel'):
        recipe('lit_s_2')
    with pytest.raises(InputError, match='learn_sigma=True'):
        GenerationRecipe('lit_small28', data(), model_args={'depth': 1, 'learn_sigma': False}).build_model()
    with pytest.raises(InputError, match='has no captions'):
        GenerationRecipe('lit_t2i_xl_2_512', data(), model_args={'in_chans': 1})
    two = ImageData('two', 'two', NAMES[:2], ImageSet(squares(6).images, np.arange(6) % 2))
    with pytest.raises(InputError, match='num_classes is 3, not 2'):
        GenerationRecipe('lit_small28', two, model_args={'depth': 1}, teacher=teacher).build_model()


# ---- a run ------------------------------------------------------------------------------------------------------


def test_a_run_stores_weights_that_the_pipeline_takes(teacher, tmp_path):
    import vishub
    options = dict(
        output=tmp_path, resolution=((28, 2),), batch_size=8, lr=1e-3, weight_decay=0., device='cpu', progress=False)
    made = recipe(teacher=teacher, inherit=True, epoch_size=24)
    result = train(made, TrainConfig(**options, max_steps=4))
    assert not result.finished and result.step == 4
    result = train(recipe(teacher=teacher, inherit=True, epoch_size=24), TrainConfig(**options))
    assert result.finished and result.step == 6 and result.folder == tmp_path / 'lit_small28.squares'
    with pytest.raises(InputError, match='other options'):
        train(recipe(epoch_size=24), TrainConfig(**options))
    pipe = vishub.pipeline('generation', f'local-dir:{result.folder}', 'cpu')
    assert tuple(pipe.class_names) == NAMES
    assert pipe('grey', num_images=1, num_inference_steps=2).pictures[0].size == (28, 28)
    assert '## Training' in (result.folder / 'README.md').read_text()
