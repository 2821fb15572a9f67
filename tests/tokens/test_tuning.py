"""Training what PYRA adds: it learns, it leaves the backbone alone, it says what is wrong."""
import pytest
import timm
import torch

from vishub import InputError, tokens


def make_model():
    torch.manual_seed(0)
    model = timm.create_model(
        'vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=2).eval()
    return tokens.apply(model, 'pyra', r=2)


def batches(count=3):
    """Bright and dark pictures."""
    labels = torch.arange(8) % 2
    return [(torch.randn(8, 3, 32, 32) * 0.1 + labels[:, None, None, None] - 0.5, labels) for _ in range(count)]


def test_it_learns_and_leaves_the_backbone_alone():
    model = make_model()
    kept = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    told = []
    losses = tokens.tune(
        model, batches(), steps=40, lr=1e-2, progress=lambda done, total: told.append((done, total)))
    assert len(losses) == 40 and sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert told == [(step, 40) for step in range(1, 41)] and not model.training
    own = dict(model.named_parameters())
    assert kept and all(torch.equal(own[name], value) for name, value in kept.items())
    assert any(own[name].abs().max() > 0 for name in own if name.endswith('pyra_b'))  # the gates have opened
    images, labels = batches(1)[0]
    tuned = model(images)
    assert (tuned.argmax(1) == labels).float().mean() > 0.9
    tokens.merge_lora(model)
    torch.testing.assert_close(model(images), tuned, atol=1e-5, rtol=1e-5)


def test_bad_input():
    for options, message in (
            (dict(steps=0), 'steps is 0'), (dict(steps=1, lr=0), 'lr is 0'), (dict(steps=3, lr=2), 'lr is 2')):
        with pytest.raises(InputError, match=message):
            tokens.tune(make_model(), batches(), **options)
    with pytest.raises(InputError, match='gives no images'):
        tokens.tune(make_model(), [], steps=1)
    with pytest.raises(InputError, match='needs a model with PYRA'):
        tokens.tune(timm.create_model('vit_tiny_patch16_224', depth=1), batches(), steps=1)
    images, labels = batches(1)[0]
    with pytest.raises(InputError, match='the loss is nan in step 1'):
        tokens.tune(make_model(), [(images * float('nan'), labels)], steps=2)
