"""ASTR against its official outputs, and what is particular to a model of clips with a sparse context."""
import pytest
import timm
import torch

from tests.models.official_weights import load_case
from vishub.models.astr import ASTR, CrossAttention, checkpoint_filter_fn, clip_indices
from vishub.models.cost import count_macs
from vishub.tasks.video_segmentation.training import segmentation_loss

PARAMETERS = {  # for clips of 2, 3 and 4 frames
    'astr_res2net50': (37_168_874, 37_907_883, 38_646_892),
    'astr_pvt_v2_b2': (34_730_290, 35_469_299, 36_208_308),
    'astr_tiny': (747_426, 793_939, 840_452),
}


def tiny(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('astr_tiny', **kwargs).eval()


def video(count, side=32, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def clips(frames, clip_size=3):
    """All clips of a video, as a batch."""
    return torch.stack([frames[clip_indices(n, clip_size, len(frames))] for n in range(len(frames))])


# Official outputs

@pytest.mark.parametrize('name, case', [
    ('astr_pvt_v2_b2', 'pvt_v2_b2_64_empty_context'),
    ('astr_res2net50', 'res2net50_160'),
    ('astr_pvt_v2_b2', 'pvt_v2_b2_352'),
])
@torch.no_grad()
def test_golden(name, case):
    case = load_case('astr', f'astr_{case}')
    model = timm.create_model(name, clip_size=case.meta['clip_size']).eval()
    assert sum(p.numel() for p in model.parameters()) == case.parameters
    official = {f'module.{key}': value for key, value in case.state_dict.items()}
    missing, unexpected = model.load_state_dict(checkpoint_filter_fn(official, model), strict=False)
    assert not unexpected and all(key.endswith('num_batches_tracked') for key in missing)
    got = {}

    def keep(module, key, value):
        module.register_forward_hook(lambda module, inputs, output: got.update({key: value(inputs, output)}))

    keep(model.fusion, 'fused_features_sub', lambda inputs, output: output[:, ::16, ::4, ::4])
    keep(model.cross, 'local_features', lambda inputs, output: inputs[0])
    keep(model.cross.attn, 'cross_attention_last', lambda inputs, output: output[-1:])
    keep(model.context, 'context_tokens_last', lambda inputs, output: output[0][-1:].transpose(1, 2))
    got['logits'], got['body_maps'] = model(case.inputs['clip'], return_maps=True)
    targets = {key: case_target(recipe) for key, recipe in case.meta['targets'].items()}
    loss, parts = segmentation_loss(
        (got['logits'], got['body_maps']), targets['mask'][:, 0], targets['body'], return_parts=True)
    got['losses'] = torch.stack([*parts, loss])
    for key in case.outputs:
        case.check(key, got[key])


def case_target(recipe):
    import numpy as np
    noise = np.random.Generator(np.random.PCG64(recipe['seed'])).standard_normal(recipe['shape'], dtype=np.float32)
    threshold = float(recipe['recipe'].split('>')[1].split(')')[0])
    return torch.from_numpy((noise > threshold).astype(np.float32))


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters(name):
    for clip_size, count in zip((2, 3, 4), PARAMETERS[name]):
        with torch.device('meta'):
            model = timm.create_model(name, clip_size=clip_size)
        assert sum(p.numel() for p in model.parameters()) == count


def test_macs():
    # with all tokens kept, where the official count had those of one clip
    assert count_macs('astr_pvt_v2_b2') / 1e9 == pytest.approx(70.02, rel=0.04)


# Streaming

@pytest.mark.parametrize('clip_size', [2, 3, 4])
@pytest.mark.parametrize('count, chunk', [(1, 1), (2, 1), (3, 2), (9, 1), (9, 4)])
@torch.no_grad()
def test_stream_is_the_batch(clip_size, count, chunk):
    model = tiny(clip_size=clip_size)
    frames = video(count, side=64)
    passes = []
    model.backbone.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    streamed = torch.cat(list(model.stream(frames.split(chunk))))
    assert sum(passes) == count
    torch.testing.assert_close(streamed, model(clips(frames, clip_size)), rtol=1e-4, atol=1e-3)


def test_stream_keeps_little_and_is_prompt():
    model = tiny()
    fed = []

    def frames():
        for number, frame in enumerate(video(12)):
            fed.append(number)
            yield frame[None]

    seen = []
    for logits in model.stream(frames()):
        seen.append((len(fed), len(logits)))
    # frame 0 waits for frames 1 and 2, frame 1 for frame 3; from then on one in, one out
    assert seen == [(3, 1), (4, 3)] + [(n, 1) for n in range(5, 13)]
    with pytest.raises(ValueError, match='eval'):
        next(model.train().stream(frames()))


def test_clip_indices():
    assert clip_indices(5, 3, 9) == [5, 4, 3]
    assert clip_indices(0, 3, 9) == [0, 1, 2] and clip_indices(1, 4, 9) == [1, 0, 3, 4]
    assert clip_indices(0, 4, 2) == [0, 1, 1, 1] and clip_indices(0, 3, 1) == [0, 0, 0]


# The context

@torch.no_grad()
def test_only_kept_tokens_matter():
    model = tiny()
    fused = model.forward_frames(video(3, side=64)).fused[None]
    tokens, valid, maps = model.context(fused[:, 1:])
    keep = (maps.flatten() > 0)
    assert 0 < keep.sum() < keep.numel() and valid.all() and tokens.shape[1] == keep.sum()
    every = []
    for block, frame in zip(model.context.lags, fused[0, 1:]):
        _, around = block(frame[None])
        every.append(model.context.merge(torch.cat([frame[None], around], 1)).flatten(2)[0].T)
    torch.testing.assert_close(tokens[0], torch.cat(every)[keep])  # frame by frame, row by row
    # padding, as another sample of the batch may need it, changes nothing
    local = model.key_conv(fused[:, 0])
    padded = torch.cat([tokens, torch.full((1, 5, tokens.shape[2]), 3.)], 1)
    mask = torch.cat([valid, torch.zeros(1, 5, dtype=torch.bool)], 1)
    torch.testing.assert_close(model.cross(local, padded, mask), model.cross(local, tokens, valid))


@torch.no_grad()
def test_empty_context_of_one_sample():
    torch.manual_seed(0)
    attn = CrossAttention(12, 3)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 4, 12)
    valid = torch.tensor([[True] * 4, [False] * 4])
    out = attn(x, context, valid)
    torch.testing.assert_close(out[1], attn.proj.bias.expand(5, -1))
    torch.testing.assert_close(out[:1], attn(x[:1], context[:1], valid[:1]))
    model = tiny()
    for block in model.context.lags:
        block.coarse_map[-1].bias.fill_(-1e6)
    assert torch.isfinite(model(clips(video(3)))).all()


@torch.no_grad()
def test_head_layouts():
    """The official layout reads (head, token, channel) as rows; the standard one brings the heads to the channels."""
    official, standard = CrossAttention(6, 2), CrossAttention(6, 2, 'standard')
    standard.load_state_dict(official.state_dict())
    x, context, valid = torch.randn(1, 4, 6), torch.randn(1, 3, 6), torch.ones(1, 3, dtype=torch.bool)
    q = official.q(x)[0].reshape(4, 2, 3)
    k, v = official.kv(context)[0].reshape(3, 2, 2, 3).unbind(1)
    heads = torch.stack([((q[:, h] @ k[:, h].T) * 3 ** -0.5).softmax(-1) @ v[:, h] for h in range(2)])  # heads, N, d
    torch.testing.assert_close(official(x, context, valid)[0], official.proj(heads.reshape(4, 6)))
    torch.testing.assert_close(standard(x, context, valid)[0], official.proj(torch.cat([*heads], -1)))


def test_a_batch_without_any_context_still_trains_everything():
    model = tiny().train()
    for block in model.context.lags:
        torch.nn.init.constant_(block.coarse_map[-1].bias, -1e6)
    logits, maps = model(torch.randn(2, 3, 3, 32, 32))
    (logits.square().mean() + maps.square().mean()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# Forms of input

@torch.no_grad()
def test_fewer_frames_and_other_sizes():
    model = tiny(clip_size=4)
    assert model(torch.randn(2, 2, 3, 16, 24)).shape == (2, 1, 16, 24)
    assert model(torch.randn(1, 3, 3, 40, 64)).shape == (1, 1, 40, 64)
    assert model(torch.randn(1, 2, 3, 45, 67), pad=True).shape == (1, 1, 45, 67)
    wide = torch.randn(1, 2, 3, 32, 40)
    torch.testing.assert_close(model(wide, pad=True), model(wide))
    assert tiny(num_classes=3)(torch.randn(1, 3, 3, 32, 32)).shape == (1, 3, 32, 32)


@pytest.mark.parametrize('shape, says', [
    ((3, 3, 32, 32), 'frame 0 is the one to segment'),
    ((1, 3, 1, 32, 32), 'expected a clip'),
    ((1, 3, 3, 36, 32), 'multiples of 8'),
    ((1, 3, 3, 24, 32), 'too small for the pooling window'),
    ((1, 1, 3, 32, 32), 'auxiliary frame'),
    ((1, 4, 3, 64, 64), 'at most 3 frames'),
])
def test_refusals(shape, says):
    with pytest.raises(ValueError, match=says):
        tiny()(torch.randn(shape))


def test_refused_types_and_arguments():
    with pytest.raises(ValueError, match='floating point'):
        tiny()(torch.zeros(1, 3, 3, 32, 32, dtype=torch.uint8))
    for arguments, says in (
            ({'clip_size': 1}, 'clip_size'), ({'head_layout': 'odd'}, 'head_layout'), ({'num_heads': 5}, 'num_heads'),
            ({'in_chans': 1}, 'RGB'), ({'pretrained_backbone': True}, 'no weights of its own')):
        with pytest.raises(ValueError, match=says):
            tiny(**arguments)
    with pytest.raises(ValueError, match='from .backbone'):
        timm.create_model('astr_tiny', features_only=True)
    with pytest.raises(ValueError, match='strides 4, 8, 16 and 32'):
        ASTR(backbone='vit_tiny_patch16_224')


def test_any_backbone_of_timm():
    model = ASTR(backbone='resnet18', embed_dim=16, depth=1, num_heads=4).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 3, 64, 32)).shape == (1, 1, 64, 32)


# timm's methods

@torch.no_grad()
def test_parts_and_intermediates():
    model = tiny()
    clip = clips(video(3))[:1]
    features, maps = model.forward_intermediates(clip)
    assert len(maps) == 3 and all(x.shape == (1, 48, 4, 4) for x in maps)
    torch.testing.assert_close(model.forward_head(features), model(clip))
    torch.testing.assert_close(model.forward_intermediates(clip, [1], intermediates_only=True)[0], maps[1])
    last, chosen = model.forward_intermediates(clip, [0], stop_early=True)
    torch.testing.assert_close(last, maps[0])
    model.reset_classifier(0)
    torch.testing.assert_close(model(clip), features)
    model.reset_classifier(2)
    assert model(clip).shape == (1, 2, 32, 32)
    with pytest.raises(ValueError, match='pooled'):
        model.reset_classifier(2, 'avg')


def test_initialisation():
    model = timm.create_model('astr_pvt_v2_b2')
    weight = model.key_conv[0].weight
    assert weight.std().item() == pytest.approx((2 / (192 * 9)) ** 0.5, rel=0.02)
    assert not model.blocks[3].attn.qkv.bias.any()
    assert model.backbone.stages_0.blocks[0].attn.q.weight.std().item() == pytest.approx(0.02, rel=0.1)
