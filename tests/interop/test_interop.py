"""Our classifiers in other people's libraries, as `docs/interop.md` tells it. `make test-interop` runs this.

The libraries are imported where they are used: the ordinary suite collects this file without having them.
"""
import contextlib
import functools
import importlib.metadata
import io
import json
import shutil

import matrix
import pytest
import timm
import torch
from PIL import Image

import vishub
from vishub import catalog
from vishub.hub import find
from vishub.hub.folder import save_folder

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings('ignore')]

PYRAMIDS = [
    row.name for row in catalog.architectures('classification')
    if row.family in {catalog.find(name).family for name in matrix.PYRAMIDS}]


def limited(name, way):
    """Expects what `matrix.LIMITS` says of this cell."""
    limit = matrix.LIMITS.get((name, way))
    return contextlib.nullcontext() if limit is None else pytest.raises(Exception, match=limit.message)


def images(name, batch_size=2):
    size = matrix.SUBJECTS[name]
    return torch.randn(batch_size, 3, size, size)


def build(name, **kwargs):
    return timm.create_model(name, num_classes=5, **kwargs).eval()


# ---- one check a way; each gets an architecture and an empty folder --------------------------------------------------


def check_unet(name, folder):
    segment(name, 'Unet')


def check_dpt(name, folder):
    segment(name, 'DPT', **({'decoder_readout': 'ignore'} if name in matrix.PYRAMIDS else {}))


def segment(name, decoder, **kwargs):
    """Forward and backward of a segmentation model on our encoder; every parameter of the encoder's trunk learns."""
    import segmentation_models_pytorch as smp
    model = getattr(smp, decoder)(f'tu-{name}', encoder_weights=None, classes=2, **kwargs)
    x = images(name)
    masks = model(x)
    assert masks.shape == (2, 2, *x.shape[2:])
    masks.square().mean().backward()
    gradients = [p.grad for p in model.encoder.parameters() if p.grad is not None]
    assert len(gradients) > 10 and all(torch.isfinite(g).all() for g in gradients)
    assert sum(g.abs().sum() for g in gradients) > 0


def check_transformers(name, folder):
    """Same logits as timm, a training step, and back to timm."""
    from transformers import AutoModel, AutoModelForImageClassification
    ours = build(name)
    x = images(name)
    source = save_folder(ours, folder / f'{name}.here', metrics={}, card={}, dtype=torch.float32)
    theirs = AutoModelForImageClassification.from_pretrained(source).eval()
    with torch.inference_mode():
        torch.testing.assert_close(theirs(x).logits, ours(x))
        features = AutoModel.from_pretrained(source).eval()(x, output_hidden_states=True)
        assert features.pooler_output.shape == (2, ours.num_features)
        assert len(features.hidden_states) == len(ours.feature_info)

    theirs.train()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    before = theirs(x, labels=torch.tensor([0, 1])).loss
    before.backward()
    optimizer.step()
    theirs.eval()
    theirs.save_pretrained(folder / 'trained')
    again = AutoModelForImageClassification.from_pretrained(folder / 'trained').eval()
    back = timm.create_model(f'local-dir:{folder / "trained"}', pretrained=True).eval()
    with torch.inference_mode():
        expected = theirs(x).logits
        assert not torch.allclose(expected, ours(x))
        torch.testing.assert_close(again(x).logits, expected)
        torch.testing.assert_close(back(x), expected)


def check_extractor(name, folder):
    """All maps that timm gives, from the graph that torchvision cuts."""
    from torchvision.models.feature_extraction import create_feature_extractor
    model = build(name)
    modules = [info['module'] for info in model.feature_info]
    x = images(name)
    with torch.inference_mode():
        features = create_feature_extractor(model, modules)(x)
        reference = {}
        for module in modules:
            model.get_submodule(module).register_forward_hook(
                lambda _, __, output, module=module: reference.update({module: output}))
        model(x)
        torch.testing.assert_close(features, reference)


def check_export(name, folder):
    """Saved, loaded, and run with another batch size."""
    model, program = captured(name)
    torch.export.save(program, folder / 'model.pt2')
    x = images(name, batch_size=3)
    with torch.inference_mode():
        logits = torch.export.load(folder / 'model.pt2').module()(x)
        torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-5)


@functools.cache
def captured(name):
    """A model and its `torch.export` program of free batch size."""
    model = build(name)
    with torch.no_grad():
        return model, torch.export.export(
            model, (images(name),), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=64)},))


def check_onnxruntime(name, folder):
    import onnxruntime
    model, program = captured(name)
    file = io.BytesIO()
    torch.onnx.export(program, dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    x = images(name, batch_size=3)
    logits, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-3, atol=1e-4)


def check_compile(name, folder):
    """Forward and backward in one graph; the code generator behind it takes long and has a test of its own."""
    torch._dynamo.reset()
    model = build(name)
    x = images(name)
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend='aot_eager')):
        model.zero_grad()
        logits = forward(x)
        logits.square().mean().backward()
        results.append((logits.detach(), {
            key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


CHECKS = {
    'unet': check_unet,
    'dpt': check_dpt,
    'transformers': check_transformers,
    'extractor': check_extractor,
    'export': check_export,
    'onnxruntime': check_onnxruntime,
    'compile': check_compile,
}


@pytest.mark.parametrize('way', matrix.WAYS)
@pytest.mark.parametrize('name', matrix.SUBJECTS)
def test_way(name, way, tmp_path):
    with limited(name, way):
        CHECKS[way](name, tmp_path)


def test_versions():
    for package in matrix.LIBRARIES:
        assert importlib.metadata.version(package).partition('+')[0] == matrix.pins()[package]


def test_inductor():
    """PyTorch's own code generator, on one block a stage (it takes minutes for a whole model)."""
    compilers = ('g++', 'clang++', 'c++')
    assert any(map(shutil.which, compilers)), 'inductor writes C++, and this machine has no compiler: install g++'
    torch._dynamo.reset()
    model = build('favit_small64', depths=(1, 1, 1, 1))
    x = images('favit_small64')
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-3, atol=1e-4)


# ---- segmentation_models.pytorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize('decoder', matrix.DECODERS)
@pytest.mark.parametrize('name', matrix.PYRAMIDS)
def test_decoder(name, decoder):
    with limited(name, decoder):
        segment(name, decoder, **matrix.DECODERS[decoder])


@pytest.mark.parametrize('name', PYRAMIDS)
def test_encoder_of_every_depth(name):
    import segmentation_models_pytorch as smp
    size = catalog.find(name).input[1]
    # without memory: these are all sizes up to the largest
    with torch.device('meta'):
        x = torch.randn(1, 3, size, size)
        for depth in (3, 4, 5):
            encoder = smp.encoders.get_encoder(f'tu-{name}', depth=depth)
            features = encoder(x)
            assert len(features) == depth + 1
            for level, feature in enumerate(features):
                # its stem jumps from the image to a quarter of it: the level between has no channels
                assert feature.shape == (1, encoder.out_channels[level], size // 2 ** level, size // 2 ** level)
        masks = smp.Unet(f'tu-{name}', encoder_weights=None, classes=3)(x)
    assert masks.shape == (1, 3, size, size)


@pytest.mark.parametrize('name, size', [('favit_b2', 128), ('fcaformer_l1', 224), ('fmvit_tiny', 64)])
def test_published_sizes_learn(name, size):
    import segmentation_models_pytorch as smp
    model = smp.Unet(f'tu-{name}', encoder_weights=None, in_channels=4, classes=1)
    loss = model(torch.randn(2, 4, size, size)).square().mean()
    loss.backward()
    assert torch.isfinite(loss)
    for key, parameter in model.encoder.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key


def test_encoder_with_weights():
    import segmentation_models_pytorch as smp
    encoder = smp.encoders.get_encoder('tu-favit_small64.cifar10', weights=True).eval()
    trained = timm.create_model('favit_small64.cifar10', pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        maps = trained.forward_intermediates(x, intermediates_only=True)
        torch.testing.assert_close(encoder(x)[2:], maps)


def test_other_image_sizes():
    import segmentation_models_pytorch as smp
    fixed = smp.Unet('tu-fcaformer_small64', encoder_weights=None, img_size=96)
    plain = smp.DPT('tu-revit_tiny_distilled_patch16_224', encoder_weights=None, dynamic_img_size=True)
    for model in (fixed, plain):
        assert model(torch.randn(2, 3, 96, 96)).shape == (2, 1, 96, 96)


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'weight', [row.name for row in catalog.weights() if catalog.find(row.architecture).task == 'classification'])
def test_pipeline_with_our_weights(weight):
    from transformers import AutoModelForImageClassification, pipeline
    folder = find.weights_folders()[weight]
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    channels, *size = config['pretrained_cfg']['input_size']
    ours = timm.create_model(weight, pretrained=True).eval()
    # stored as float16, which is what transformers takes unless told
    theirs = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    x = torch.randn(2, channels, *size)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(x).logits, ours(x))
    if channels == 1:
        return  # pipelines give pictures of three channels
    pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy()
    found = pipeline('image-classification', str(folder), dtype=torch.float32)(Image.fromarray(pixels), top_k=10)
    expected = vishub.pipeline(model=weight)(pixels, top_k=10)
    assert [row['label'] for row in found] == [row.label for row in expected.predictions]
    for row, ours_row in zip(found, expected.predictions):
        assert row['score'] == pytest.approx(ours_row.probability, abs=1e-5)
    assert {row['label'] for row in found} == set(config['label_names'])
