"""ToMe against the official functions and models (golden), the worked example, and its schedules."""
import pytest
import timm
import torch

from tests.models.official_weights import load_case
from vishub import tokens
from vishub.errors import InputError
from vishub.tokens.functional import bipartite_matching, merge, merge_sizes, unmerge
from vishub.tokens.tome import merge_schedule

MATCHING = ['tome_matching_16x8_plain', 'tome_matching_17x8_cls', 'tome_matching_17x8_cls_clamped',
            'tome_matching_18x8_cls_dist']


@pytest.mark.parametrize('name', MATCHING)
def test_matching_is_the_official_one(name):
    case = load_case('tokens', name)
    metric, x, r = (case.inputs[key] for key in ('metric', 'x', 'r'))
    prefix = case.inputs['class_token'] + case.inputs['distill_token']
    plan = bipartite_matching(metric, r, prefix)
    merged, size = merge(x, plan)
    case.check('x_merged', merged)
    case.check('size', size.unsqueeze(-1), atol=0.)
    case.check('source', plan.assignment(), atol=0.)
    case.check('x_mean_mode', merged)
    if prefix < 2:
        case.check('x_unmerged', unmerge(merged, plan))
    else:
        # The official unmerge reads its input as [stayed A, B], but with a distillation token the official merge
        # wrote [A0, B0, rest of A, rest of B]: it hands out wrong tokens. Given those, ours gives the same.
        stay, count = case.inputs['metric'].shape[1] // 2 - r, merged.shape[1]
        misread = [0, stay, *range(1, stay), *range(stay + 1, count)]
        case.check('x_unmerged', unmerge(merged[:, misread], plan))

    metric, _ = merge(metric, plan)
    again = bipartite_matching(metric, r, prefix)
    merged, size = merge(merged, again, size)
    case.check('x_merged_twice', merged)
    case.check('size_twice', size.unsqueeze(-1), atol=0.)
    case.check('source_twice', again.assignment().gather(1, plan.assignment()), atol=0.)


def official_model(case, **kwargs):
    kwargs = {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
    model = timm.create_model(case.meta['timm_model'], **kwargs).eval()
    model.load_state_dict(case.state_dict)
    return model


@pytest.mark.parametrize('name', [
    'tome_deit_tiny_r8_224', 'tome_vit_tiny_r3_nopropattn_128x96', 'tome_gap_vit_tiny_r4_128'])
def test_models_are_the_official_ones(name):
    case = load_case('tokens', name)
    model = official_model(case, **case.meta['model_kwargs'])
    x = case.inputs['x']
    tokens.apply(model, 'tome', r=case.inputs['r'], prop_attn=case.meta['prop_attn'])
    with torch.inference_mode(), tokens.trace(model) as traces:
        features = model.forward_features(x)
        case.check('logits', model(x))
        if 'features' in case.outputs:
            case.check('features', features)
            case.check('source', traces[0].assignment(), atol=0.)
            case.check('logits_unpatched', tokens.remove(model)(x))
        else:
            case.check('pooled', model.forward_head(features, pre_logits=True, size=traces[0].sizes()))
    case.check('size', traces[0].sizes().unsqueeze(-1), atol=0.)
    if 'tokens_after_block' in case.meta:
        assert [end for _, end in traces[0].counts] == case.meta['tokens_after_block']


def angles(*degrees):
    radians = torch.tensor(degrees, dtype=torch.float32).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=-1).unsqueeze(0)


def test_worked_example():
    plan = bipartite_matching(angles(45, 0, 10, 90, 85, 180), r=2)
    x = torch.tensor([10., 11, 12, 13, 14, 15]).view(1, 6, 1)
    merged, size = merge(x, plan)
    torch.testing.assert_close(merged.flatten(), torch.tensor([10, 11.5, 13.5, 15]))
    assert size.tolist() == [[1, 2, 2, 1]]
    torch.testing.assert_close(unmerge(merged, plan).flatten(), torch.tensor([10, 11.5, 11.5, 13.5, 13.5, 15]))
    # Again, with 13.5 (size 2) most alike to 15 (size 1).
    plan = bipartite_matching(angles(45, 0, 170, 180), r=1)
    merged, size = merge(merged, plan, size)
    torch.testing.assert_close(merged.flatten(), torch.tensor([10, 11.5, 14]))
    assert size.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize('prefix', [0, 1, 2, 3, 5])
@pytest.mark.parametrize('count', [12, 13])
def test_prefix_stays_in_front_and_nothing_is_lost(prefix, count):
    metric = torch.randn(3, count, 4)
    x = torch.randn(3, count, 6)
    plan = bipartite_matching(metric, 3, prefix)
    merged, size = merge(x, plan)
    assert merged.shape == (3, count - 3, 6)
    torch.testing.assert_close(merged[:, :prefix], x[:, :prefix], rtol=0, atol=0)
    assert (size[:, :prefix] == 1).all()
    torch.testing.assert_close((merged * size.unsqueeze(-1)).sum(1), x.sum(1))


def test_modes_and_backends_agree():
    plan = bipartite_matching(torch.randn(2, 11, 4), 4)
    x, size = torch.randn(2, 11, 3), torch.randint(1, 5, (2, 11)).float()
    expected, sizes = merge(x, plan, size)
    got, got_sizes = merge(x, plan, size, backend='matmul')
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(got_sizes, sizes)
    total, _ = merge(x * size.unsqueeze(-1), plan, mode='sum')
    torch.testing.assert_close(total / merge_sizes(plan, size).unsqueeze(-1), expected)
    highest, _ = merge(x, plan, mode='amax')
    columns = plan.assignment().unsqueeze(-1).expand_as(x)
    torch.testing.assert_close(highest, torch.full_like(highest, -9.).scatter_reduce(1, columns, x, 'amax'))


def test_zero_keys_are_similar_to_nothing():
    metric = torch.zeros(1, 9, 4)
    metric[0, [3, 4]] = torch.randn(4)
    plan = bipartite_matching(metric, 1)
    assert (plan.source.item(), plan.keep[0, plan.target.item()].item()) == (4, 3)


@pytest.mark.parametrize('r, depth, expected', [
    ((13, -1), 12, [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]),
    ((8, -0.5), 12, [12, 11, 10, 9, 9, 8, 7, 6, 6, 5, 4, 4]),
    ((8, 1.0), 12, [0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16]),
    (8, 3, [8, 8, 8]),
    ([4, 2], 4, [4, 2, 0, 0]),
])
def test_schedules(r, depth, expected):
    assert merge_schedule(r, depth) == expected


@pytest.mark.parametrize('r', [-1, 1.5, True, (8, 1.5), [1, -1], [1] * 13, '8', None])
def test_bad_r_is_refused(r):
    with pytest.raises(InputError, match='r'):
        merge_schedule(r, 12)
