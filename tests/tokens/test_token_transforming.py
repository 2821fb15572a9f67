"""Token Transforming: worked example, invariants, and the way back."""
import pytest
import torch

from tests.tokens.small_models import images, small_model
from vishub import tokens
from vishub.errors import InputError
from vishub.tokens.functional import similarity, spread, take_rows, transform, transform_matrix

SIMILAR = torch.tensor([[[1, .8, .2, 0], [0, .4, .6, 1]]])
ANCHORS = torch.tensor([[0, 3]])
X = torch.tensor([1., 2, 3, 4]).view(1, 4, 1)


@pytest.mark.parametrize('options, weights, y, back', [
    (dict(tau=0.2, targets=2, own=False), [.993307, .880797, .119203, .006693], [1.569641, 3.430359],
     [1.582094, 1.791444, 3.208556, 3.417906]),
    (dict(tau=0.2, targets=2), [1, .880797, .119203, 0], [1.559602, 3.440398],
     [1.559602, 1.783798, 3.216202, 3.440398]),
    (dict(tau=0), [1, 1, 0, 0], [1.5, 3.5], [1.5, 1.5, 3.5, 3.5]),
])
def test_worked_example(options, weights, y, back):
    columns = transform_matrix(SIMILAR, ANCHORS, **options)
    torch.testing.assert_close(columns[0, 0], torch.tensor(weights, dtype=torch.float32), rtol=0, atol=1e-6)
    got, size = transform(X, columns)
    torch.testing.assert_close(size, torch.tensor([[2., 2]]))
    torch.testing.assert_close(got.flatten(), torch.tensor(y), rtol=0, atol=1e-5)
    restored = columns.transpose(1, 2) @ got
    torch.testing.assert_close(restored.flatten(), torch.tensor(back), rtol=0, atol=1e-5)


def random_case(M=5, n=12):
    metric, x = torch.randn(2, n, 6), torch.randn(2, n, 4)
    anchors = torch.rand(2, n).argsort(-1)[:, :M].sort(-1).values
    return metric, x, anchors, similarity(take_rows(metric, anchors), metric)


@pytest.mark.parametrize('targets', [1, 3, 99])
@pytest.mark.parametrize('tau', [0, 0.1, 2.])
def test_invariants_of_the_matrix(tau, targets):
    metric, x, anchors, similar = random_case()
    size = torch.randint(1, 4, (2, 12)).float()
    columns = transform_matrix(similar, anchors, tau, targets)
    assert ((columns > 0).sum(1) <= targets).all()
    torch.testing.assert_close(columns.sum(1), torch.ones(2, 12))
    y, new_size = transform(x, columns, size)
    torch.testing.assert_close(new_size.sum(1), size.sum(1))
    torch.testing.assert_close((y * new_size.unsqueeze(-1)).sum(1), (x * size.unsqueeze(-1)).sum(1))
    assert (y <= x.amax(1, keepdim=True) + 1e-5).all() and (y >= x.amin(1, keepdim=True) - 1e-5).all()
    if tau == 0 or targets == 1:
        assert torch.equal(columns, transform_matrix(similar, anchors, 0, 1))
        assert ((columns == 0) | (columns == 1)).all()
    # The way the models take: only those that go are multiplied.
    rest = torch.stack([torch.tensor(sorted(set(range(12)) - set(row.tolist()))) for row in anchors])
    part = columns.gather(2, rest.unsqueeze(1).expand(-1, 5, -1))
    for sizes in (size, None):
        for got, expected in zip(spread(x, anchors, rest, part, sizes), transform(x, columns, sizes)):
            torch.testing.assert_close(got, expected)
    same = torch.ones_like(x) * 3
    torch.testing.assert_close(columns.transpose(1, 2) @ transform(same, columns, size)[0], same)


def test_all_anchors_is_the_identity():
    metric = torch.randn(2, 6, 4)
    anchors = torch.arange(6).expand(2, 6)
    assert torch.equal(transform_matrix(similarity(metric, metric), anchors, 0.5), torch.eye(6).expand(2, 6, 6))


def test_order_of_the_others_does_not_matter():
    metric, x, _, _ = random_case()
    anchors = torch.arange(4).expand(2, 4)
    order = torch.cat([torch.arange(4), 4 + torch.randperm(8)])
    results = []
    for m, v in ((metric, x), (metric[:, order], x[:, order])):
        results.append(transform(v, transform_matrix(similarity(m[:, :4], m), anchors))[0])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize('name', ['vit', 'dinov2_reg', 'vit_avg', 'siglip', 'eva_rope_mixed', 'beit', 'nvit'])
@pytest.mark.filterwarnings('ignore:token_transforming. this model has no class token')
def test_in_models(name):
    model, x = small_model(name), images()
    with torch.inference_mode():
        full = model(x)
        tokens.apply(model, 'token_transforming', keep={0: 1.})
        torch.testing.assert_close(model(x), full, rtol=1e-4, atol=1e-5)
        tokens.apply(model, 'token_transforming', keep={0: 0.7, 1: 0.6})
        with tokens.trace(model) as traces:
            logits = model(x)
            maps = model.forward_intermediates(x, [1], output_fmt='NLC', intermediates_only=True)
        torch.testing.assert_close(model(x[1:]), logits[1:], rtol=1e-4, atol=1e-5)
    trace, prefix = traces[0], model.num_prefix_tokens
    assert [end - prefix for _, end in trace.counts] == [12, 8, 8]
    matrix, sizes = trace.matrix(), trace.sizes()
    torch.testing.assert_close(matrix.sum(1), torch.ones(2, 16 + prefix))
    torch.testing.assert_close(matrix.sum(2), sizes)
    assert (sizes[:, :prefix] == 1).all()
    torch.testing.assert_close(sizes[:, prefix:].sum(1), torch.full((2,), 16.))
    assert trace.importance(0).shape == (2, 16 + prefix)
    # What the blocks computed is the recorded matrix times the tokens, weighted by size.
    for layer, before in ((0, torch.ones(2, 16 + prefix)), (1, trace.sizes(0))):
        step = trace.steps[layer]
        weight = step.move * before.unsqueeze(1)
        torch.testing.assert_close(weight @ step.before / weight.sum(-1, keepdim=True), step.after,
                                   rtol=1e-4, atol=1e-5)
    y = torch.randn(2, 8 + prefix, 5)
    torch.testing.assert_close(tokens.restore(y, trace), matrix.transpose(1, 2) @ y)
    assert maps[0].shape == (2, 16, 64)


def test_detail_restores_exactly_what_did_not_change():
    model = tokens.apply(small_model('vit'), 'token_transforming', keep={0: 0.4})
    with torch.inference_mode(), tokens.trace(model) as traces:
        model(images())
    step = traces[0].steps[0]
    full = tokens.restore(step.after, traces[0], 0, detail=True)
    torch.testing.assert_close(full, step.before)
    assert not torch.allclose(tokens.restore(step.after, traces[0], 0), step.before, atol=0.1)


def test_hard_columns_are_merging():
    """tau = 0 through the models' interface: one token a patch, and restore copies it."""
    model = tokens.apply(small_model('vit'), 'token_transforming', keep={0: 0.5, 1: 0.5}, tau=0)
    with torch.inference_mode(), tokens.trace(model) as traces:
        model(images())
    y = torch.randn(2, 5, 3)
    copied = take_rows(y, traces[0].assignment())
    torch.testing.assert_close(tokens.restore(y, traces[0]), copied)


@pytest.mark.parametrize('anchors', ['mean', 'norm'])
def test_other_anchors(anchors):
    model = tokens.apply(small_model('vit'), 'token_transforming', keep={0: 0.5}, anchors=anchors)
    with torch.inference_mode(), tokens.trace(model) as traces:
        assert model(images()).isfinite().all()
    scores = traces[0].importance(0)
    if anchors == 'norm':
        torch.testing.assert_close(scores, traces[0].steps[0].before.norm(dim=-1))
    else:
        torch.testing.assert_close(scores.sum(1), torch.ones(2))
    kept = traces[0].matrix(0)[:, 1:, 1:].amax(1) == 1  # anchors own their column
    assert (scores[:, 1:].masked_fill(~kept, 9e9).amin(1) >= scores[:, 1:].masked_fill(kept, -1.).amax(1)).all()


@pytest.mark.parametrize('options, message', [
    (dict(tau=-1), 'tau is -1'), (dict(targets=0), 'targets is 0'), (dict(anchors='best'), "anchors is 'best'")])
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        tokens.apply(small_model('vit'), 'token_transforming', keep={0: 0.5}, **options)


def test_missing_class_token_is_pointed_out():
    with pytest.warns(UserWarning, match='no class token'):
        model = tokens.apply(small_model('vit_avg'), 'token_transforming', keep={0: 0.5})
    assert tokens.config(model)['anchors'] == 'mean'
