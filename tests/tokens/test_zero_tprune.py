"""Zero-TPrune: the worked examples of the formulas, and what must hold for any graph."""
import math

import pytest
import timm
import torch

from tests.tokens.small_models import images, small_model
from tests.tokens.test_tome import angles
from vishub import tokens
from vishub.errors import InputError
from vishub.tokens.functional import filter_heads, page_rank, page_rank_start, similarity
from vishub.tokens.method import Layout, Seen
from vishub.tokens.zero_tprune import ZeroTPrune

A = torch.tensor([[.5, .3, .2], [.2, .6, .2], [.1, .4, .5]])


def close(got, expected):
    torch.testing.assert_close(got.flatten(), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=2e-6)


def test_votes():
    close(page_rank(A, 1), [.266667, .433333, .3])
    close(page_rank(A, 2), [.25, .46, .29])
    close(page_rank(A, 3), [.246, .467, .287])
    close(page_rank(A, 200), [12 / 49, 23 / 49, 14 / 49])
    with pytest.raises(InputError, match='iterations is 0'):
        page_rank(A, 0)


def test_class_token_starts_higher():
    start = page_rank_start(3, 1)
    close(start, [.464102, .267949, .267949])
    close(page_rank(A, 1, start), [.312436, .407180, .280385])
    close(page_rank_start(3, 1, boost=False), [1 / 3] * 3)
    # Of four tokens one is gone: as with three.
    close(page_rank_start(4, 1, present=3), [.464102, .267949, .267949, .267949])


def test_aggregation_over_heads():
    heads = torch.tensor([[[.2, .5, .3], [.4, .3, .3]]])
    close(filter_heads(heads, 0, vmax=None), [.316228, .412311, .3])
    flat = torch.cat([heads, torch.full((1, 1, 3), 1 / 3)], dim=1)
    close(filter_heads(flat, 0), [.316228, .412311, .3])  # the uniform head has variance 0
    close(filter_heads(heads, 0, vmin=0.05), [.2, .5, .3])  # .14 passes, .02 does not
    close(filter_heads(heads, 0, vmin=0.5), [.316228, .412311, .3])  # none passes: all are used
    close(filter_heads(heads, 0, vmin=0., vmax=None, eir=False), [.3, .4, .3])


def test_restricted_graph():
    mask = torch.tensor([1., 0, 1])
    close(page_rank(A, 1, mask=mask), [.440476, 0, .559524])
    # The same as cutting the graph out, for any number of votes.
    attn, keep = torch.rand(2, 3, 7, 7).softmax(-1), [0, 2, 3, 6]
    mask = torch.zeros(2, 1, 7)
    mask[..., keep] = 1
    small = attn[:, :, keep][..., keep]
    small = small / small.sum(-1, keepdim=True)
    torch.testing.assert_close(page_rank(attn, 5, mask=mask)[..., keep], page_rank(small, 5))
    scores = torch.rand(2, 3, 7) * mask
    torch.testing.assert_close(
        filter_heads(scores, 1, 0.05, 0.3, present=3)[:, keep], filter_heads(scores[..., keep], 1, 0.05, 0.3))


def method(tokens_after=3, count=5, prefix=0, **options):
    made = ZeroTPrune()
    made.prepare(None, dict(tokens_after={0: tokens_after}, **options), Layout(12, prefix, prefix, count, True))
    return made


def seen_of(keys, probs=None, prefix=0, layer=0, count=3):
    keys = keys.unsqueeze(1)
    return Seen(layer, count, prefix, prefix, None, True, keys, keys, keys, None, probs)


@pytest.mark.parametrize('count, gone', [(1, {1}), (2, {1, 3})])
def test_similar_stage(count, gone):
    importance = torch.tensor([[.30, .10, .25, .15, .20]])
    seen = seen_of(angles(0, 40, 10, 90, 45))
    found = method().similar_patches(torch.zeros(1, 5, 2), seen, importance, count)
    assert set(found.flatten().tolist()) == gone


def test_partitions_and_metrics():
    keys, importance = torch.randn(2, 9, 4), torch.rand(2, 9)
    rank = importance.argsort(-1, descending=True)
    may_go = dict([('sequential-u', rank[:, 5:]), ('sequential-i', rank[:, :4]), ('alternate', rank[:, 1::2])])
    for metric in ('cosine', 'dot', 'euclidean', 'manhattan'):
        for partition, candidates in may_go.items():
            found = method(8, 9, partition=partition, metric=metric).similar_patches(
                keys, seen_of(keys), importance, 1)
            stay = torch.stack([
                keys[b, sorted(set(range(9)) - set(candidates[b].tolist()))] for b in range(2)])
            best = similarity(torch.stack([keys[b, candidates[b]] for b in range(2)]), stay, metric).amax(-1)
            torch.testing.assert_close(found[:, 0], candidates.gather(1, best.argmax(-1, keepdim=True))[:, 0])
    torch.testing.assert_close(similarity(keys, keys, 'manhattan'),
                               -(keys[:, :, None] - keys[:, None]).abs().sum(-1))


def test_a_duplicate_of_an_important_token_goes_first():
    keys = torch.randn(1, 8, 4)
    keys[0, 6] = keys[0, 1]
    importance = torch.tensor([[.2, .3, .15, .14, .05, .06, .04, .06]])
    assert method(7, 8).similar_patches(keys, seen_of(keys), importance, 1).item() == 6


def test_graph_invariants():
    attn = torch.rand(2, 3, 6, 6).softmax(-1)
    start = page_rank_start(6, 1)
    for votes in (1, 2, 7):
        torch.testing.assert_close(page_rank(attn, votes, start).sum(-1), torch.ones(2, 3))
    doubly = (torch.eye(6)[torch.randperm(6)] + torch.eye(6)[torch.randperm(6)]) / 2
    torch.testing.assert_close(page_rank(doubly, 4), torch.full((6,), 1 / 6))
    order = torch.tensor([0, 3, 1, 5, 4, 2])
    moved = attn[:, :, order][..., order]
    torch.testing.assert_close(page_rank(moved, 3, start), page_rank(attn, 3, start)[..., order])


@pytest.mark.parametrize('name', ['vit', 'vit_avg', 'deit_distilled', 'eva02', 'beit', 'nvit'])
def test_in_models(name):
    model, x = small_model(name), images(3)
    with torch.inference_mode():
        full = model(x)
        tokens.apply(model, 'zero_tprune', keep={0: 1.})
        torch.testing.assert_close(model(x), full, rtol=1e-4, atol=1e-5)
        tokens.apply(model, 'zero_tprune', keep={0: 0.7, 1: 0.5})
        with tokens.trace(model) as traces:
            logits = model(x)
        torch.testing.assert_close(model(x[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)
    trace, prefix = traces[0], model.num_prefix_tokens
    assert [count for count in trace.counts] == [(16 + prefix, 12 + prefix), (12 + prefix, 6 + prefix)] + [
        (6 + prefix, 6 + prefix)]
    for step in trace.steps.values():
        # Survivors are exact copies, in their old order.
        for b in range(3):
            kept = (step.move[b] >= 0).nonzero().flatten()
            assert torch.equal(step.after[b], step.before[b, kept])


def test_all_off_is_the_mean_page_rank():
    attn = torch.rand(2, 3, 9, 9).softmax(-1)
    plain = method(5, 9, prefix=1, share=0., votes=4, boost=False, vmin=0., vmax=None, eir=False)
    keep, importance = plain.choose(torch.zeros(2, 9, 4), seen_of(torch.randn(2, 9, 4), attn, prefix=1, count=5))
    expected = page_rank(attn, 4).mean(1)
    torch.testing.assert_close(importance, expected)
    best = expected[:, 1:].topk(4).indices.sort(-1).values + 1
    assert torch.equal(keep, torch.cat([torch.zeros(2, 1, dtype=torch.int64), best], 1))


def test_stages_in_order():
    """Similar tokens leave before importance is voted on, and never count again."""
    attn, keys = torch.rand(2, 2, 9, 9).softmax(-1), torch.randn(2, 9, 4)
    made = method(5, 9, prefix=1, similar={0: 2}, votes=3)
    seen = seen_of(keys, attn, prefix=1, count=5)
    keep, importance = made.choose(torch.zeros(2, 9, 4), seen)
    first = filter_heads(page_rank(attn, 1, page_rank_start(9, 1)), 1)
    gone = made.similar_patches(None, seen, first, 2) + 1
    for b in range(2):
        left = [i for i in range(9) if i not in gone[b].tolist()]
        graph = attn[b][:, left][..., left]
        graph = (graph / graph.sum(-1, keepdim=True)).unsqueeze(0)
        second = filter_heads(page_rank(graph, 3, page_rank_start(7, 1)), 1)[0]
        torch.testing.assert_close(importance[b, left], second)
        best = sorted([0] + [left[i] for i in (second[1:].topk(4).indices + 1).tolist()])
        assert keep[b].tolist() == best


def test_default_votes_follow_depth():
    assert [method().vote_count(i) for i in range(12)] == [30] * 3 + [5] * 6 + [1] * 3
    assert method(votes=7).vote_count(0) == 7
    assert [method(votes={0: 9}).vote_count(i) for i in (0, 1, 3)] == [9, 30, 5]


def test_presets():
    with torch.device('meta'):
        model = timm.create_model('deit_small_patch16_224')
    tokens.apply(model, 'zero_tprune', preset='main')
    assert tokens.config(model)['tokens_after'] == {1: 158, 3: 127, 6: 102, 9: 82}
    assert math.isclose(tokens.macs(model).total, 2.990e9, rel_tol=1e-3)
    for name, preset in tokens.PRESETS.items():
        assert set(preset.published) == set(preset.config) and not set(preset.published) & set(preset.inferred), name


@pytest.mark.parametrize('options, message', [
    (dict(keep={0: 0.5}, similar={0: 9}), 'at most 8 of 16'),
    (dict(keep={0: 0.9}, similar={0: 4}), 'removes 1 tokens'),
    (dict(keep={0: 0.5}, vmin=1, vmax=0.5), 'vmin'),
    (dict(keep={0: 0.5}, votes=0), 'votes is 0'),
    (dict(keep={0: 0.5}, share=1.5), 'share is 1.5'),
    (dict(keep={0: 0.5}, feature='keys'), 'feature is'),
    (dict(preset='heavy'), 'there are: main, light'),
])
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        tokens.apply(small_model('vit'), 'zero_tprune', **options)
