"""The losses, and fine-tuning on the common training loop."""
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from vishub.models.nvit import NViT
from vishub.pruning.distillation import DistilledRecipe, head_logits, label_loss, mean_logits, soft_kl
from vishub.training import TrainConfig, train
from vishub.training.recipe import Recipe

DIMS = dict(EMB=32, head=[2, 1], QK=[8, 8], V=[8, 16], MLP=[32, 48])


def small(**kwargs):
    return NViT(**{'img_size': 16, 'patch_size': 8, 'num_classes': 3, 'dims': DIMS, **kwargs}).eval()


def test_label_loss_is_the_published_one():
    cls, dist = torch.randn(4, 3), torch.randn(4, 3)
    labels, teacher_labels = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 1, 0, 0])
    ours = -((cls + dist) / 2).log_softmax(-1)[range(4), labels].mean()
    theirs = -dist.log_softmax(-1)[range(4), teacher_labels].mean()
    torch.testing.assert_close(label_loss((cls, dist), labels), ours)
    torch.testing.assert_close(label_loss((cls, dist), labels, teacher_labels, 0.3), 0.7 * ours + 0.3 * theirs)
    shares = nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(label_loss((cls, dist), shares), ours)


def test_soft_kl_is_the_official_one_up_to_the_number_of_classes():
    student, teacher = torch.randn(4, 1000), torch.randn(4, 1000)
    p = (teacher / 3).softmax(-1)
    official = (p * (p.log() - (student / 3).log_softmax(-1))).mean()  # over batch and classes
    torch.testing.assert_close(100 * soft_kl(student, teacher, 3.), 1e5 * official)
    assert soft_kl(teacher, teacher, 3.).abs() < 1e-6


@pytest.mark.parametrize('distilled', [True, False])
def test_head_logits_are_those_of_the_model(distilled):
    model, images = small(distilled=distilled), torch.randn(2, 3, 16, 16)
    logits = head_logits(model, images)
    assert len(logits) == 1 + distilled
    torch.testing.assert_close(mean_logits(logits), model(images))


class Noise(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, key):
        generator = torch.Generator().manual_seed(key[1])
        return torch.randn(3, 16, 16, generator=generator), key[1] % 3


class NoiseRecipe(Recipe):
    def build_model(self):
        raise AssertionError('the student is given')

    def train_set(self):
        return Noise()

    def prepare(self, batch, side, training):
        return batch[0], batch[1]

    def loss(self, output, targets):
        raise AssertionError('the distilled loss is used')


class Always(nn.Module):
    """A teacher that always answers class 1."""

    def forward(self, images):
        return torch.tensor([0., 1., 0.]).expand(len(images), 3)


def test_fine_tuning_brings_the_student_to_its_teacher(tmp_path):
    teacher, student = small(dims=dict(DIMS, MLP=[64, 64])), small()
    with torch.no_grad():
        teacher.head.weight.normal_()
        teacher.head_dist.weight.normal_()
    images = torch.stack([Noise()[0, index, 16][0] for index in range(32)])

    @torch.no_grad()
    def distance(model):
        return soft_kl(model(images), teacher(images), 1.).item()

    recipe = DistilledRecipe(student, NoiseRecipe(), teacher=teacher, kl_weight=100., temperature=1.)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    result = train(recipe, TrainConfig(
        tmp_path, resolution=((16, 15),), batch_size=16, lr=3e-3, ema_decay=0., device='cpu', validate_every=0,
        progress=False))
    assert result.finished and result.model.dims == DIMS
    assert result.model(images).shape == (32, 3)
    assert distance(result.model) < 0.7 * distance(student)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_a_cnn_teacher_moves_the_distillation_head(tmp_path):
    student = small()
    recipe = DistilledRecipe(student, NoiseRecipe(), cnn_teacher=Always(), alpha=1.)
    result = train(recipe, TrainConfig(
        tmp_path, resolution=((16, 10),), batch_size=16, lr=3e-3, ema_decay=0., device='cpu', validate_every=0,
        progress=False))
    images = torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        assert (head_logits(result.model, images)[1].argmax(dim=-1) == 1).all()
