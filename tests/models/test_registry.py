"""What every model of vishub must do. A family joins by being in the catalogue; nothing is listed here.

* All architectures are built on the meta device (shapes without memory), where the checks of shapes and names cost
  little even for the largest.
* Numbers are computed with the smallest architecture of each family, at its smallest image.

A model says itself what it cannot do, and that is tested too: `fixed_input_size` and `min_input_size` in its default
configuration, and on its class `export_limits`, the ways of export (see `EXPORTS`) that it does not allow.

To add a kind of input, add its task to `MAKE_INPUT`; what holds for image classifiers only asks for CLASSIFIERS. An
input is a tensor or a tuple of arguments, each with the batch first; of an output that is a tuple the first counts.
"""
import contextlib
import copy
import functools
import io
import math
import pickle
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models import group_parameters
from torch.utils._pytree import tree_leaves

import vishub  # noqa: F401
from vishub import catalog


def make_images(cfg, batch_size, size):
    """(B, C, H, W) of noise, on the current default device."""
    return torch.randn(batch_size, cfg['input_size'][0], *size)


def make_slides(cfg, batch_size, size):
    """Patch features (B, regions, grid, grid, C) and region features (B, regions, C) of noise."""
    return torch.randn(batch_size, 3, *cfg['input_size']), torch.randn(batch_size, 3, cfg['input_size'][-1])


def make_clips(cfg, batch_size, size):
    """(B, T, C, H, W) of noise."""
    return torch.randn(batch_size, cfg['num_frames'], cfg['input_size'][0], *size)


def make_crops(cfg, batch_size, size):
    """Templates (B, 2, C, h, w) and search crops (B, C, H, W) of noise."""
    return torch.randn(batch_size, 2, *cfg['template_size']), torch.randn(batch_size, cfg['input_size'][0], *size)


def make_noise(cfg, batch_size, size):
    """Noisy pictures (B, C, H, W), timesteps (B,) and classes (B,), or features of captions (B, L, 4096)."""
    classes = torch.arange(batch_size) % cfg['num_classes'] if cfg['num_classes'] else torch.randn(batch_size, 9, 4096)
    return torch.randn(batch_size, cfg['input_size'][0], *size), torch.full((batch_size,), 500), classes


# task -> (default configuration, batch size, size) -> input of the model
MAKE_INPUT = {
    'classification': make_images,
    'deblurring': make_images,
    'generation': make_noise,
    'slide_analysis': make_slides,
    'tracking': make_crops,
    'video_prediction': make_clips,
    'video_segmentation': make_clips,
    'volume_segmentation': make_images,  # with three axes
}
# what a family needs so that training reaches all of it
TRAINING_ARGS = {'mambaclinix': {'deep_supervision': True}}
# families whose norms over a few voxels enlarge rounding: compared in float64 where a batch's size changes the order
DOUBLE = {'mambaclinix'}

ARCHITECTURES = [row.name for row in catalog.architectures()]
CLASSIFIERS = [row.name for row in catalog.architectures('classification')]
FAMILIES = list(dict.fromkeys(row.family for row in catalog.architectures()))
CLASSIFIER_FAMILIES = [name for name in FAMILIES if catalog.family(name).task == 'classification']


@functools.cache
def built_on_meta(name):
    try:
        with torch.device('meta'):
            return timm.create_model(name).eval()
    except RuntimeError:  # timm's own ViT reads a value while it is built, in timm < 1.0.21 or so
        return timm.create_model(name).eval().to('meta')


def on_meta(name):
    """The architecture without memory; a copy, because building one takes seconds even so."""
    return copy.deepcopy(built_on_meta(name))


def default_cfg(name):
    return built_on_meta(name).pretrained_cfg


@functools.cache
def smallest(family):
    """The family's architecture with the fewest parameters."""
    names = [row.name for row in catalog.architectures() if row.family == family]
    return min(names, key=lambda name: sum(p.numel() for p in built_on_meta(name).parameters()))


def make_input(name, batch_size=2, size=None, device='cpu'):
    cfg = default_cfg(name)
    if size is None:
        size = (cfg['input_size'] if cfg['fixed_input_size'] else cfg.get('min_input_size') or cfg['input_size'])[1:]
    with torch.device(device):
        return MAKE_INPUT[catalog.find(name).task](cfg, batch_size, size)


def run_all(model, x):
    """The tensors that the model gives for what `make_input` gave."""
    output = model(*x) if isinstance(x, tuple) else model(x)
    return [part for part in tree_leaves(output) if part is not None]


def run(model, x):
    return run_all(model, x)[0]


def some_loss(outputs):
    """Of all that can be trained: some parameters reach only one part of the output."""
    return sum(part.float().square().mean() for part in outputs if part.requires_grad)


def pick(x, index):
    """Some of the batch of what `make_input` gave."""
    return tuple(part[index] for part in x) if isinstance(x, tuple) else x[index]


def built(family, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(smallest(family), **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and not p.any():  # a branch that starts at zero hides all that is in it
                torch.nn.init.normal_(p, std=0.02)
    return model


def names_in_cfg(value):
    return [value] if isinstance(value, str) else list(value or ())


# ---- names and data, all architectures --------------------------------------------------------------------------


def test_the_catalogue_has_all_that_is_registered():
    registered = {name for family in FAMILIES for name in timm.list_models(module=family)}
    assert registered == set(ARCHITECTURES)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_default_configuration(name):
    for tagged in (name, *timm.list_pretrained(f'{name}.*')):
        cfg = timm.get_pretrained_cfg(tagged)
        assert cfg.license and cfg.paper_ids and cfg.origin_url, f'{tagged}: license, paper_ids or origin_url missing'
        assert catalog.family(catalog.find(name).family).arxiv in str(cfg.paper_ids)
        if cfg.has_weights:
            assert cfg.hf_hub_id == f'vishub/{name}.{cfg.tag}'
        if cfg.label_names:
            assert len(cfg.label_names) == cfg.num_classes
    assert tuple(default_cfg(name)['input_size']) == catalog.find(name).input


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_names_in_the_configuration_exist(name):
    model = on_meta(name)
    cfg = model.pretrained_cfg
    for module in names_in_cfg(cfg['first_conv']):
        weight = model.get_submodule(module).weight
        # a linear layer takes all values of a patch
        in_chans = weight.shape[1] if weight.ndim > 2 else math.gcd(weight.shape[1], cfg['input_size'][0])
        assert in_chans == cfg['input_size'][0]
    for module in names_in_cfg(cfg['classifier']):
        weight = model.get_submodule(module).weight
        assert name not in CLASSIFIERS or weight.shape[0] == cfg['num_classes']


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_parameter_groups(name):
    model = on_meta(name)
    parameters = dict(model.named_parameters())
    if type(model).__module__.startswith('vishub.'):  # timm's own classes also name what their other forms have
        assert set(model.no_weight_decay()) <= set(parameters)
    for coarse in (False, True):
        layer_of = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert set(layer_of) == set(parameters)
        last = max(layer_of.values())
        assert last > 0
        for module in names_in_cfg(model.pretrained_cfg['first_conv']):
            assert layer_of[f'{module}.weight'] == 0
        # what no pattern matches falls into the last layer: only heads and closing norms may
        strays = [key for key, layer in layer_of.items() if layer == last and re.search(r'\b(blocks|stem)\b', key)]
        assert not strays


# ---- shapes of classifiers: all of them once, the smallest of each family in every way -----------------------------


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_shapes(name):
    model = on_meta(name)
    size = model.pretrained_cfg['input_size'][1:]
    features, maps = model.forward_intermediates(make_input(name, size=size, device='meta'))
    check_maps(maps, model.feature_info, size)
    assert model.num_classes == model.pretrained_cfg['num_classes']
    assert model.forward_head(features).shape == (2, model.num_classes)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


def check_maps(maps, infos, size):
    assert len(maps) == len(infos)
    for feature_map, info in zip(maps, infos):
        height, width = (math.ceil(side / info['reduction']) for side in size)
        assert feature_map.shape == (2, info['num_chs'], height, width)


@pytest.mark.parametrize('family', CLASSIFIER_FAMILIES)
def test_reset_classifier(family):
    model = on_meta(smallest(family))
    x = make_input(smallest(family), device='meta')
    assert model.get_classifier() is not None
    pool = model.global_pool
    unpooled = model.forward_features(x).shape
    with torch.device('meta'):
        for num_classes in (7, 0):
            model.reset_classifier(num_classes)
            assert model.num_classes == num_classes
            assert model(x).shape == (2, num_classes or model.num_features)
        model.reset_classifier(0, '')
        assert model(x).shape == unpooled
        model.reset_classifier(7, pool)
        assert model(x).shape == (2, 7)


@pytest.mark.parametrize('family', CLASSIFIER_FAMILIES)
@torch.inference_mode()
def test_without_classifier_and_with_one_channel(family):
    x = make_input(smallest(family))[:, :1]
    model = built(family, num_classes=0, in_chans=1).eval()
    assert model(x).shape == (2, model.num_features)
    for module in names_in_cfg(model.pretrained_cfg['first_conv']):
        assert model.get_submodule(module).weight.shape[1] == 1
    unpooled = built(family, num_classes=0, in_chans=1, global_pool='').eval()
    assert unpooled(x).shape == model.forward_features(x).shape


@pytest.mark.parametrize('family', CLASSIFIER_FAMILIES)
@torch.inference_mode()
def test_feature_maps(family):
    model = built(family).eval()
    infos = list(model.feature_info)
    x = make_input(smallest(family))
    size = x.shape[2:]
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    check_maps(maps, infos, size)
    check_maps(model.forward_intermediates(x, indices=2, intermediates_only=True), infos[-2:], size)
    first, = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(first, maps[0])

    ends = (0, len(infos) - 1)
    extractor = built(family, features_only=True, out_indices=ends).eval()
    check_maps(extractor(x), [infos[i] for i in ends], size)
    assert extractor.feature_info.channels() == [infos[i]['num_chs'] for i in ends]
    assert extractor.feature_info.reduction() == [infos[i]['reduction'] for i in ends]

    # pruned to its first feature, a model is smaller and still gives it
    whole = sum(p.numel() for p in model.parameters())
    assert list(model.prune_intermediate_layers([0])) == [0]
    assert sum(p.numel() for p in model.parameters()) < whole
    pruned, = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    torch.testing.assert_close(pruned, maps[0])


@pytest.mark.parametrize('family', CLASSIFIER_FAMILIES)
@torch.inference_mode()
def test_sizes(family):
    name = smallest(family)
    model = built(family).eval()
    cfg = model.pretrained_cfg
    if cfg['fixed_input_size']:
        _, height, width = cfg['input_size']
        with pytest.raises((ValueError, AssertionError)):  # AssertionError is timm's own
            model(make_input(name, size=(height + 1, width + 40)))
        return
    assert cfg.get('min_input_size'), 'a model of free size must say its smallest'
    _, height, width = cfg['min_input_size']
    for size in ((height, width), (height + 4, width + 47), (height + 32, width + 1)):
        assert model(make_input(name, size=size)).shape == (2, cfg['num_classes'])
    with pytest.raises(ValueError, match=f'{height}'):
        model(make_input(name, size=(height - 1, width + 47)))


# ---- numbers, the smallest of each family -----------------------------------------------------------------------


@pytest.mark.parametrize('family', FAMILIES)
@torch.inference_mode()
def test_copies_give_the_same_output(family, tmp_path):
    model = built(family).eval()
    x = make_input(smallest(family))
    expected = run(model, x)
    assert torch.isfinite(expected).all()
    assert torch.equal(run(copy.deepcopy(model), x), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), x), expected)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    torch.manual_seed(1)
    other = timm.create_model(smallest(family)).eval()
    assert not torch.equal(run(other, x), expected)
    other.load_state_dict(load_file(tmp_path / 'model.safetensors'))
    assert torch.equal(run(other, x), expected)


@pytest.mark.parametrize('family', FAMILIES)
@torch.inference_mode()
def test_images_of_a_batch_do_not_meet(family):
    model = built(family).eval()
    x = make_input(smallest(family), batch_size=3)
    if family in DOUBLE:
        model, x = model.double(), x.double()
    torch.testing.assert_close(run(model, x)[1:2], run(model, pick(x, slice(1, 2))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('family', CLASSIFIER_FAMILIES)
@torch.inference_mode()
def test_parts_of_the_forward_are_the_forward(family):
    model = built(family).eval()
    x = make_input(smallest(family))
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    pre_logits = model.forward_head(features, pre_logits=True)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pre_logits)


@pytest.mark.parametrize('family', FAMILIES)
def test_gradients_with_and_without_checkpointing(family):
    x = make_input(smallest(family))
    losses, gradients = [], []
    for enable in (False, True):
        model = built(family, **TRAINING_ARGS.get(family, {})).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        loss = some_loss(run_all(model, x))
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.isfinite(gradient).all(), f'{name} is not trained'
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize('family', FAMILIES)
def test_bfloat16(family):
    model = built(family, **TRAINING_ARGS.get(family, {})).train()
    x = make_input(smallest(family))
    with torch.autocast('cpu', torch.bfloat16):
        outputs = run_all(model, x)
    some_loss(outputs).backward()
    assert all(torch.isfinite(output).all() for output in outputs)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    with torch.inference_mode():
        exact = run(model, x)
        with torch.autocast('cpu', torch.bfloat16):
            rounded = run(model, x).float()
    assert F.cosine_similarity(rounded.flatten(), exact.flatten(), dim=0) > 0.98


@pytest.mark.parametrize('family', FAMILIES)
def test_drop_rates_act_in_training_only(family):
    task = catalog.family(family).task
    # denoisers drop nothing but labels, deblurring and segmentation of clips nothing
    rates = {
        'generation': ('class_drop_rate',), 'deblurring': (), 'video_segmentation': (),
        'volume_segmentation': ('drop_path_rate',),
    }.get(task, ('drop_rate', 'drop_path_rate'))
    x = make_input(smallest(family), batch_size=8 if task == 'generation' else 2)
    plain = built(family).eval()
    for rate in rates:
        model = built(family, **{rate: 0.5})
        model.load_state_dict(plain.state_dict())
        with torch.no_grad():
            model.eval()
            assert torch.equal(run(model, x), run(plain, x))
            model.train()
            for module in model.modules():  # the batch's own statistics would differ from the stored ones
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
            assert not torch.equal(run(model, x), run(model, x)), f'{rate} does nothing'


# ---- export, the smallest of each family ------------------------------------------------------------------------


def scripted(model, x):
    return torch.jit.script(model)(x)


def compiled(model, x):
    # Capture and decomposition are what a model can break; the code generator behind them only takes long.
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend='aot_eager')(x)


def exported(model, x):
    return captured(model, x).module()(x)


def captured(model, x):
    """The model's `torch.export` program; made once a family."""
    key = type(model)
    if key not in _captured:
        _captured[key] = torch.export.export(model, (x,))
    return _captured[key]


_captured = {}


def feature_graph(model, x):
    from torchvision.models.feature_extraction import create_feature_extractor
    module = names_in_cfg(model.pretrained_cfg['classifier'])[0]
    return create_feature_extractor(model, [module])(x)[module]


def onnx(model, x):
    import onnxruntime
    program = torch.onnx.export(captured(model, x), (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


EXPORTS = {'script': scripted, 'compile': compiled, 'export': exported, 'onnx': onnx, 'fx': feature_graph}


@pytest.mark.parametrize('way', EXPORTS)
@pytest.mark.parametrize('family', CLASSIFIER_FAMILIES)
@pytest.mark.filterwarnings('ignore')
@torch.no_grad()
def test_export(family, way):
    model = built(family).eval()
    x = make_input(smallest(family))
    expected = model(x)  # the same weights and input for every way, from the seed
    impossible = way in getattr(model, 'export_limits', ())
    with pytest.raises(Exception) if impossible else contextlib.nullcontext():
        torch.testing.assert_close(EXPORTS[way](model, x), expected, rtol=1e-4, atol=1e-5)
