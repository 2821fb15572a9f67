"""`vishub convert`: every official layout, every nesting, the wrong file, and the file that wants to run code."""
import argparse
import importlib.util
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import vishub
from vishub import catalog, cli
from vishub.hub import convert as convert_module
from vishub.hub.convert import convert, read_checkpoint, state_dict_of
from vishub.pruning.official import load_official

_spec = importlib.util.spec_from_file_location(
    'official_weights', Path(__file__).parents[1] / 'models' / 'official_weights.py')
official = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(official)


@pytest.fixture(scope='module')
def favit():
    return official.load_case('favit', 'favit_b0_224')


@pytest.fixture(scope='module')
def revit():
    return official.load_case('nvit', 'revit_tiny_224')


@pytest.fixture(scope='module')
def small():
    """A small classifier's own state dict with 7 classes: quick to convert."""
    torch.manual_seed(0)
    return timm.create_model('favit_small64', num_classes=7).state_dict()


def saved(path, content):
    torch.save(content, path)
    return path


def load(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


@torch.no_grad()
def test_favit_trainer_file_gives_the_official_outputs(favit, tmp_path):
    file = saved(tmp_path / 'official.pth', {
        'model': favit.state_dict, 'epoch': 299, 'args': argparse.Namespace(lr=1e-3), 'optimizer': {'state': {}}})
    done = convert('favit', file, tmp_path / 'favit_b0.official')
    assert (done.architecture, done.num_classes, done.entry) == ('favit_b0', 1000, 'model')
    favit.check('logits', load(done.folder)(favit.inputs['x']), atol=5e-6)
    metrics = json.loads((done.folder / 'metrics.json').read_text())
    assert metrics['converted_from'] == {
        'file': 'official.pth', 'sha256': vishub.hub.find.sha256(file), 'entry': 'model'}
    card = (done.folder / 'README.md').read_text()
    assert 'license: unknown' in card and 'Not measured' in card
    assert sorted(os.listdir(tmp_path)) == ['favit_b0.official', 'official.pth']  # nothing temporary is left


@torch.no_grad()
def test_fcaformer_from_averaged_weights(tmp_path):
    case = official.load_case('fcaformer', 'fcaformer_l1_224')
    raw = {key: torch.zeros_like(value) for key, value in case.state_dict.items()}
    file = saved(tmp_path / 'official.pth', {'model': raw, 'model_ema': case.state_dict})
    done = convert('fcaformer', file, tmp_path / 'out')
    assert (done.architecture, done.entry) == ('fcaformer_l1', 'model_ema')
    case.check('logits', load(done.folder)(case.inputs['x']), atol=5e-6)


@torch.no_grad()
def test_fcaformer_dense_backbone_from_a_detector(tmp_path):
    case = official.load_case('fcaformer', 'fcaformer_dense_l2_256x320')
    tensors = {f'module.backbone.{key}': value for key, value in case.state_dict.items()}
    tensors['module.decode_head.conv.weight'] = torch.zeros(3)
    done = convert('fcaformer', saved(tmp_path / 'a.pth', {'state_dict': tensors}), tmp_path / 'out')
    assert (done.architecture, done.num_classes) == ('fcaformer_dense_l2', 0)
    for i, feature_map in enumerate(load(done.folder).forward_intermediates(
            case.inputs['x'], intermediates_only=True)):
        case.check(f'out{i}', feature_map, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('name', ['nvit', 'revit', 'revit_tiny_distilled_patch16_224'])
def test_revit_with_and_without_stated_sizes(revit, tmp_path, name):
    content = {'model': revit.state_dict} if name == 'revit' else {'model': revit.state_dict, 'dim': revit.meta['dims']}
    done = convert(name, saved(tmp_path / 'a.pth', content), tmp_path / 'out')
    assert (done.architecture, done.licence) == ('revit_tiny_distilled_patch16_224', 'cc-by-nc-sa-4.0')
    revit.check('logits_mean', load(done.folder)(revit.inputs['x']))
    assert 'license: cc-by-nc-sa-4.0' in (done.folder / 'README.md').read_text()


def pruned(dims, classes=5):
    """An official dense state dict of any sizes, filled by name."""
    width, tokens = dims['EMB'], 198
    shapes = {
        'cls_token': (1, 1, width), 'dist_token': (1, 1, width), 'pos_embed': (1, tokens, width),
        'patch_embed.proj.weight': (width, 768, 1, 1), 'patch_embed.proj.bias': (width,),
        'norm.weight': (width,), 'norm.bias': (width,),
    }
    for head in ('head', 'head_dist'):
        shapes.update({f'{head}.weight': (classes, width), f'{head}.bias': (classes,)})
    for i, (heads, query, value, hidden) in enumerate(zip(dims['head'], dims['QK'], dims['V'], dims['MLP'])):
        block = {'norm1': (width,), 'norm2': (width,), 'attn.qkv.Q': (heads * query, width),
                 'attn.qkv.K': (heads * query, width), 'attn.qkv.V': (heads * value, width),
                 'attn.proj.proj': (width, heads * value), 'mlp.fc1': (hidden, width), 'mlp.fc2': (width, hidden)}
        for layer, shape in block.items():
            shapes.update({f'blocks.{i}.{layer}.weight': shape, f'blocks.{i}.{layer}.bias': shape[:1]})
        shapes[f'blocks.{i}.attn.qkv.token_mask'] = (tokens, 1)
    return {name: torch.from_numpy(official.official_value(name, shape)) for name, shape in shapes.items()}


def test_pruned_nvit_takes_its_sizes_from_the_file(tmp_path):
    dims = dict(EMB=48, head=[2, 3], QK=[8, 16], V=[16, 8], MLP=[64, 96])
    tensors = pruned(dims)
    done = convert('nvit', saved(tmp_path / 'a.pth', {'model': tensors, 'dim': dims}), tmp_path / 'out')
    model = load(done.folder)
    assert (done.architecture, model.num_classes, model.dims) == ('nvit_distilled_patch16_224', 5, dims)
    q, k, v = (tensors[f'blocks.1.attn.qkv.{kind}.weight'] for kind in 'QKV')
    torch.testing.assert_close(model.blocks[1].attn.qkv.weight.detach(), torch.cat([q, k, v]))
    with pytest.raises(vishub.InputError, match="no 'dim' entry"):  # heads cannot be read from the dense shapes
        convert('nvit', saved(tmp_path / 'b.pth', {'model': tensors}), tmp_path / 'other')


def test_prunable_nvit_tells_its_sizes_by_its_shapes(tmp_path):
    dims = dict(EMB=48, head=[2, 2], QK=[8, 8], V=[8, 8], MLP=[64, 64])
    tensors = pruned(dims)
    for i in range(2):
        for kind in 'QKV':  # head * channel, E -> channel, E, head
            name = f'blocks.{i}.attn.qkv.{kind}'
            tensors[f'{name}.weight'] = tensors[f'{name}.weight'].view(2, 8, 48).permute(1, 2, 0).contiguous()
            tensors[f'{name}.bias'] = tensors[f'{name}.bias'].view(2, 8).t().contiguous()
        projection = tensors.pop(f'blocks.{i}.attn.proj.proj.weight').view(48, 2, 8).permute(0, 2, 1)
        tensors[f'blocks.{i}.attn.proj.weight'] = projection.contiguous()
        tensors[f'blocks.{i}.attn.proj.bias'] = tensors.pop(f'blocks.{i}.attn.proj.proj.bias')
    convert('nvit', saved(tmp_path / 'a.pth', {'model': tensors}), tmp_path / 'out')
    convert('nvit', saved(tmp_path / 'b.pth', {'model': pruned(dims), 'dim': dims}), tmp_path / 'dense')
    one, other = load(tmp_path / 'out').state_dict(), load(tmp_path / 'dense').state_dict()
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_nvit_with_token_scales(tmp_path):
    dims = dict(EMB=48, head=[2, 3], QK=[8, 16], V=[16, 8], MLP=[64, 96])
    tensors = pruned(dims)
    file = saved(tmp_path / 'a.pth', {'model': tensors, 'dim': dims, 'args': argparse.Namespace(lr=1e-3)})
    folder = convert('nvit', file, tmp_path / 'out').folder
    model = load(folder)
    scales = tensors['blocks.1.attn.qkv.token_mask']
    assert torch.equal(model.blocks[1].attn.token_scale.flatten(), scales.flatten()) and scales.std() > 0.01
    with pytest.warns(UserWarning, match='CC BY-NC-SA'):
        other = load_official(file)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(image), other(image))


@torch.no_grad()
def test_dit_from_its_averaged_weights(tmp_path):
    case = official.load_case('lit', 'dit_s_2_256')
    file = saved(tmp_path / 'a.pt', {
        'model': {key: torch.zeros(()).expand_as(value) for key, value in case.state_dict.items()},
        'ema': case.state_dict, 'opt': {'state': {}}, 'args': argparse.Namespace(cfg_scale=4.0)})
    done = convert('dit', file, tmp_path / 'dit_s_2.mine')
    assert (done.architecture, done.num_classes, done.entry) == ('dit_s_2', 1000, 'ema')
    assert done.licence == 'cc-by-nc-4.0'
    x, t, y = (torch.as_tensor(case.inputs[key]) for key in 'xty')
    case.check('out', load(done.folder)(x, t, y))


def best_fit(name, tensors):
    return convert_module._best_fit(name, Path('a.pth'), {}, tensors)


def test_dit_of_other_sizes():
    with torch.device('meta'):
        tensors = {name: timm.create_model(name).state_dict() for name in ('dit_s_2_512', 'dit_small28')}
        own = timm.create_model('dit_small28', img_size=32, num_classes=4, learn_sigma=False).state_dict()
    # fits dit_s_2 with another image size, too; what is registered goes first
    assert best_fit('dit', tensors['dit_s_2_512'])[0].name == 'dit_s_2_512'
    assert best_fit('dit_s_2', tensors['dit_s_2_512'])[1] == {'num_classes': 1000, 'img_size': 64}
    assert best_fit('dit', tensors['dit_small28'])[1] == {'num_classes': 10}
    row, arguments = best_fit('dit', own)
    assert (row.name, arguments) == ('dit_small28', {'num_classes': 4, 'img_size': 32, 'learn_sigma': False})
    with pytest.raises(vishub.InputError, match='holds dit_s_2_512, not dit_b_2'):
        best_fit('dit_b_2', tensors['dit_s_2_512'])


@torch.no_grad()
def test_predformer_needs_a_name_where_two_share_theirs(tmp_path):
    case = official.load_case('predformer', 'predformer_fac_st_taxibj_32')
    tensors = {f'module.{key}': value for key, value in case.state_dict.items()}
    file = saved(tmp_path / 'latest.pth', {'epoch': 3, 'state_dict': tensors, 'optimizer': {}, 'scheduler': {}})
    with pytest.raises(vishub.InputError, match='fits predformer_fac_st_taxibj and predformer_fac_ts_taxibj'):
        convert('predformer', file, tmp_path / 'out')
    done = convert('predformer_fac_st_taxibj', file, tmp_path / 'out')
    assert (done.architecture, done.num_classes) == ('predformer_fac_st_taxibj', 0)
    case.check('output', load(done.folder)(case.inputs['x']))  # in the order in which the official code trained it
    config = json.loads((done.folder / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [2, 32, 32]


def test_predformer_tells_the_arrangement_by_its_names():
    with torch.device('meta'):
        triplet = timm.create_model('predformer_triplet_sts_weather').state_dict()
        quad = timm.create_model('predformer_quad_stts_mmnist').state_dict()
    case = official.load_case('predformer', 'predformer_triplet_sts_taxibj_32')
    assert best_fit('predformer', case.state_dict)[0].name == 'predformer_triplet_sts_taxibj'
    for tensors, names in ((triplet, 'sts_weather and .*tst_weather'), (quad, 'tsst_mmnist and .*stts_mmnist')):
        with pytest.raises(vishub.InputError, match=names):  # our own names do not tell
            best_fit('predformer', tensors)


@torch.no_grad()
def test_conslide_from_the_whole_learner(tmp_path):
    case = official.load_case('conslide', 'conslide_hit_n5')
    file = saved(tmp_path / 'a.pth', {f'net.{key}': value for key, value in case.state_dict.items()})
    done = convert('conslide', file, tmp_path / 'out')
    assert (done.architecture, done.num_classes) == ('conslide_hit', 8)
    got = load(done.folder)(case.inputs['patch_features'], case.inputs['region_features'])
    case.check('logits', got.logits)
    config = json.loads((done.folder / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [8, 8, 768]
    assert (done.folder / 'model.safetensors').stat().st_size < 41e6  # without the three quarters that it never uses


def test_deeprftv2_tells_its_form_by_its_names():
    case = official.load_case('deeprftv2', 'deeprftv2_s_128')
    tensors, entry = state_dict_of({'params': {f'module.{key}': value for key, value in case.state_dict.items()}})
    row, arguments = best_fit('deeprftv2', tensors)
    assert (entry, row.name, arguments) == ('params', 'deeprftv2_s', {})
    with pytest.raises(vishub.InputError, match='holds deeprftv2_s, not deeprftv2_b'):
        best_fit('deeprftv2_b', tensors)


def test_conslide_of_other_sizes():
    with torch.device('meta'):
        own = timm.create_model('conslide_hit', num_classes=2, depth=3, in_features=1024).state_dict()
    assert best_fit('conslide', own)[1] == {'num_classes': 2, 'depth': 3, 'in_features': 1024}


def test_a_finer_image_size_is_kept(tmp_path):
    model = timm.create_model('fcaformer_small64', img_size=96)
    done = convert('fcaformer', saved(tmp_path / 'a.pth', model.state_dict()), tmp_path / 'out')
    loaded = load(done.folder)
    assert loaded.pretrained_cfg['input_size'] == (3, 96, 96)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize('wrap, entry', [
    (lambda tensors: tensors, ''),
    (lambda tensors: {'model': tensors}, 'model'),
    (lambda tensors: {'state_dict': {f'module.{key}': value for key, value in tensors.items()}}, 'state_dict'),
    (lambda tensors: {'ema': {'module': tensors, 'updates': 7}, 'model': {'x': torch.zeros(1)}}, 'ema.module'),
    (lambda tensors: {'ema': None, 'model': {'state_dict': tensors}}, 'model.state_dict'),
    (lambda tensors: {'model': {f'_orig_mod.module.{key}': value for key, value in tensors.items()}}, 'model'),
])
def test_every_nesting_is_unwrapped(small, wrap, entry):
    tensors, found = state_dict_of(wrap(dict(small)))
    assert found == entry and tensors.keys() == small.keys()


@pytest.mark.parametrize('suffix', ['.pt', '.safetensors'])
def test_half_precision_and_safetensors(small, tmp_path, suffix):
    tensors = {key: value.half() for key, value in small.items()}
    file = tmp_path / f'official{suffix}'
    save_file(tensors, file) if suffix == '.safetensors' else torch.save(tensors, file)
    done = convert('favit', file, tmp_path / 'favit_small64.mine')
    assert (done.architecture, done.num_classes) == ('favit_small64', 7)
    kept = read_checkpoint(done.folder / 'model.safetensors')
    assert all(kept[key].dtype == torch.float16 and torch.equal(kept[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize('name, right', [
    ('favit_b1', 'favit_b0'), ('fcaformer_l1', 'favit_b0'), ('nvit', 'favit_b0')])
def test_the_right_model_is_named(favit, tmp_path, name, right):
    file = saved(tmp_path / 'a.pth', {'model': favit.state_dict})
    with pytest.raises(vishub.InputError, match=f'holds {right}, not {name}: run vishub convert {right}'):
        convert(name, file, tmp_path / 'out')
    assert os.listdir(tmp_path) == ['a.pth']


class Attack:
    """Runs `os.system` when it is unpickled by a reader that lets it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {self.marker}',)


@pytest.mark.parametrize('protocol', ['torch', 'torch-legacy', 'pickle'])
def test_a_file_that_wants_to_run_code_does_not(small, tmp_path, protocol):
    marker, file = tmp_path / 'ran', tmp_path / 'official.pth'
    content = {'model': dict(small), 'args': Attack(marker)}
    if protocol == 'pickle':
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=protocol == 'torch')
    with pytest.raises(vishub.InputError) as caught:
        convert('favit', file, tmp_path / 'out')
    assert not marker.exists()
    assert str(file) in str(caught.value) and '\n' not in str(caught.value)
    if protocol != 'pickle':
        assert 'posix.system would have to run' in str(caught.value)
        torch.load(file, weights_only=False)  # the trap is a real one
        assert marker.exists()


@pytest.mark.parametrize('damage', ['truncated', 'header', 'empty', 'text', 'missing', 'list', 'foreign', 'jit'])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_damaged_and_foreign_files_are_one_sentence(small, tmp_path, capsys, damage, suffix):
    file = tmp_path / f'a{suffix}'
    foreign = {'conv1.weight': torch.zeros(64, 3, 7, 7), 'fc.weight': torch.zeros(1000, 512)}
    content = foreign if damage == 'foreign' else dict(small)
    save_file(content, file) if suffix == '.safetensors' else torch.save(content, file)
    if damage == 'truncated':
        file.write_bytes(file.read_bytes()[:-5000])
    elif damage == 'header':
        file.write_bytes(struct.pack('<Q', 1 << 40) + b'{}')
    elif damage == 'empty':
        file.write_bytes(b'')
    elif damage == 'text':
        file.write_text('<html>404</html>')
    elif damage == 'missing':
        file.unlink()
    elif damage == 'list':
        torch.save([1, 2], file)
    elif damage == 'jit':
        torch.jit.script(torch.nn.Linear(1, 1)).save(str(file))
    with pytest.raises(SystemExit) as caught:
        cli.main(['convert', 'favit', str(file), '--output', str(tmp_path / 'out')])
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, '')
    assert err.startswith('vishub: ') and err.count('\n') == 1 and str(file) in err
    assert not (tmp_path / 'out').exists() and not any(name.startswith('.') for name in os.listdir(tmp_path))


def test_an_interrupted_write_leaves_nothing(small, tmp_path, monkeypatch):
    file = saved(tmp_path / 'a.pth', dict(small))
    monkeypatch.setattr('vishub.hub.folder._check_rebuilds', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert('favit', file, tmp_path / 'out')
    assert os.listdir(tmp_path) == ['a.pth']


def test_weights_that_are_there_are_not_replaced(small, tmp_path):
    file = saved(tmp_path / 'a.pth', dict(small))
    convert('favit_small64', file, tmp_path / 'out')
    before = (tmp_path / 'out' / 'model.safetensors').stat()
    for place in ('out', 'a.pth'):
        with pytest.raises(vishub.InputError, match='already holds weights'):
            convert('favit_small64', file, tmp_path / place)
    assert (tmp_path / 'out' / 'model.safetensors').stat() == before


@pytest.mark.parametrize('name, why', [
    ('fmvit', 'neither code nor weights'), ('fmvit_tiny', 'neither code nor weights'), ('vit_mini_patch2_28', 'vit')])
def test_families_without_a_release_say_so(tmp_path, name, why):
    with pytest.raises(vishub.InputError, match='no official checkpoints') as caught:
        convert(name, tmp_path / 'a.pth', tmp_path / 'out')
    assert why in str(caught.value)


def test_unknown_family_names_the_nearest(tmp_path):
    with pytest.raises(catalog.UnknownNameError, match='Nearest: .*favit'):
        convert('favitt', tmp_path / 'a.pth', tmp_path / 'out')


def test_the_verb_says_what_it_wrote(small, tmp_path, capsys):
    file = saved(tmp_path / 'a.pth', {'model_ema': dict(small)})
    with pytest.raises(SystemExit) as caught:
        cli.main(['convert', 'favit', str(file), '--output', str(tmp_path / 'out')])
    out, _ = capsys.readouterr()
    assert caught.value.code == 0
    assert out.splitlines() == [
        f'favit_small64, 7 classes (entry model_ema): {tmp_path / "out"}', 'licence of the weights: unknown']


def test_astr_keeps_its_backbone_and_tells_the_number_of_frames():
    with torch.device('meta'):
        own = timm.create_model('astr_tiny', clip_size=4, num_classes=2).state_dict()
    row, arguments = best_fit('astr', own)
    assert (row.name, arguments) == ('astr_tiny', {'num_classes': 2, 'clip_size': 4})
    names = official.load_case('astr', 'astr_pvt_v2_b2_64_empty_context').state_dict
    tensors, _ = convert_module.state_dict_of({f'module.{key}': torch.zeros(1) for key in names})
    assert set(tensors) == set(names) and convert_module._astr_arguments('', {}, tensors) == {'clip_size': 2}
