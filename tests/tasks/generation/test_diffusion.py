"""Schedule, posteriors and losses against the official code of DiT."""
import math

import pytest
import torch

from tests.models.official_weights import load_case
from tests.tasks.generation.toy import toy_denoiser
from vishub import InputError
from vishub.tasks.generation.diffusion import (
    Diffusion,
    distillation_loss,
    hybrid_loss,
    pixel_log_likelihood,
    respaced_timesteps,
)

# ---- official outputs -------------------------------------------------------------------------------------------


def test_golden_tables_and_step():
    case = load_case('lit', 'diffusion_1000_steps')
    diffusion = Diffusion()
    for output, table in (
            ('betas', diffusion.betas), ('alphas_cumprod', diffusion.alphas_cumprod),
            ('posterior_variance', diffusion.posterior_variance),
            ('posterior_log_variance_clipped', diffusion.posterior_log_variance),
            ('posterior_mean_coef1', diffusion.posterior_mean_coef1),
            ('posterior_mean_coef2', diffusion.posterior_mean_coef2), ('timestep_map', diffusion.timesteps)):
        case.check(output, table, rtol=1e-6, atol=1e-7)
    x, noise, t = case.inputs['x'], case.inputs['noise'], torch.tensor(case.inputs['t_index'])
    step = diffusion.posterior(toy_denoiser(case.state_dict)(x, t), x, t)
    case.check('mean', step.mean, rtol=1e-5, atol=1e-5)
    case.check('log_variance', step.log_variance, atol=1e-5)
    case.check('pred_xstart', step.x_start, rtol=1e-5, atol=1e-4)
    case.check('p_sample', step.mean + (t > 0).view(-1, 1, 1, 1) * (0.5 * step.log_variance).exp() * noise, atol=1e-5)
    case.check('q_sample', diffusion.add_noise(x, noise, t), atol=1e-6)


def test_golden_losses_and_gradients():
    case = load_case('lit', 'diffusion_losses')
    x_start = (0.5 * case.inputs['x_start']).clamp(-1, 1)
    noise, t = case.inputs['noise'], torch.tensor(case.inputs['t'])
    weights = {name: value.clone().requires_grad_() for name, value in case.state_dict.items()}
    diffusion = Diffusion()
    x = diffusion.add_noise(x_start, noise, t)
    output = toy_denoiser(weights)(x, t)
    loss = hybrid_loss(diffusion, output, x_start, x, noise, t)
    case.check('mse', loss.noise, rtol=1e-5, atol=1e-6)
    case.check('vb', loss.variational, rtol=1e-4, atol=1e-5)
    case.check('loss', loss.total, rtol=1e-4, atol=1e-5)
    loss.total.mean().backward(retain_graph=True)
    case.check('grad_conv_weight', weights['conv.weight'].grad, rtol=1e-4, atol=1e-6)
    case.check('grad_conv_bias', weights['conv.bias'].grad, rtol=1e-4, atol=1e-6)

    teacher = {'conv.weight': case.state_dict['conv.weight'] * 1.1, 'conv.bias': case.state_dict['conv.bias'] + 0.05}
    kd_noise, kd_variance = distillation_loss(output, toy_denoiser(teacher)(x, t))
    case.check('kd_noise', kd_noise, rtol=1e-4, atol=1e-9)
    case.check('kd_variance', kd_variance, rtol=1e-4, atol=1e-7)
    case.check('total_with_kd', loss.total + 0.5 * kd_noise + 0.05 * kd_variance, rtol=1e-4, atol=1e-5)


def test_the_spot_values_of_the_paper():
    diffusion = Diffusion()
    assert float(diffusion.alphas_cumprod[1]) == pytest.approx(0.9997800920720721, abs=1e-12)
    assert float(diffusion.alphas_cumprod[500]) == pytest.approx(0.07779665836502389, abs=1e-12)
    assert float(diffusion.alphas_cumprod[999]) == pytest.approx(4.035829765375676e-05, rel=1e-9)
    assert float(diffusion.posterior_variance[1]) == pytest.approx(5.453187661300667e-05, rel=1e-9)
    assert float(diffusion.posterior_log_variance[0]) == pytest.approx(-9.81672513529595, abs=1e-9)


# ---- respacing --------------------------------------------------------------------------------------------------


def test_respacing():
    assert respaced_timesteps('10') == list(range(0, 1000, 111))
    assert respaced_timesteps('ddim20') == list(range(0, 1000, 50))
    assert respaced_timesteps('') == list(range(1000))
    assert respaced_timesteps('1') == [0]
    kept = respaced_timesteps('10,12,8')
    assert len(kept) == 30
    assert kept[:5] == [0, 37, 74, 111, 148] and kept[9:12] == [333, 334, 364] and kept[21:23] == [666, 667]
    assert kept[23] == 714 and kept[-1] == 999


@pytest.mark.parametrize('sections, words', [
    ('ddim3000', 'exactly 3000 of 1000'), ('ddim700', 'integer stride'), ('400,400,400', 'section of 334'),
    ('ten', 'no respacing'), ('10,', 'no respacing'), ('0', 'no respacing')])
def test_bad_respacing(sections, words):
    with pytest.raises(InputError, match=words):
        respaced_timesteps(sections)


def test_a_respaced_schedule_has_the_same_signal():
    whole, kept = Diffusion(), respaced_timesteps('50')
    short = Diffusion(kept)
    assert short.num_steps == 50
    torch.testing.assert_close(short.alphas_cumprod, whole.alphas_cumprod[kept])
    torch.testing.assert_close(torch.cumprod(1 - short.betas, dim=0), short.alphas_cumprod)
    # all timesteps kept are the schedule itself
    torch.testing.assert_close(Diffusion(respaced_timesteps('1000')).betas, whole.betas, rtol=1e-9, atol=1e-12)


# ---- properties -------------------------------------------------------------------------------------------------


def test_the_noise_gives_the_picture_back():
    diffusion = Diffusion()
    generator = torch.Generator().manual_seed(0)
    x_start, noise = torch.randn(2, 3, 2, 4, 4, generator=generator)
    t = torch.tensor([0, 300, 700])
    x = diffusion.add_noise(x_start, noise, t)
    torch.testing.assert_close(diffusion.predict_start(x, noise, t), x_start, rtol=1e-4, atol=1e-4)
    # the true noise and v = -1 are the true posterior: nothing is lost in the bound but at the pixels
    output = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    loss = hybrid_loss(diffusion, output, x_start, x, noise, t)
    assert float(loss.noise.abs().max()) == 0
    assert float(loss.variational[1:].abs().max()) < 1e-4


def test_the_bound_does_not_reach_the_noise():
    diffusion = Diffusion()
    output = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x_start, noise = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    t = torch.tensor([0, 500])
    x = diffusion.add_noise(x_start, noise, t)
    hybrid_loss(diffusion, output, x_start, x, noise, t).variational.sum().backward()
    assert not output.grad[:, 0].any() and output.grad[:, 1].any()


def test_pixel_probabilities_sum_to_one():
    levels = torch.arange(256) / 127.5 - 1
    mean = torch.full_like(levels, 0.3)
    log = pixel_log_likelihood(levels, mean, torch.full_like(levels, math.log(0.1)))
    assert float(log.exp().sum()) == pytest.approx(1, abs=1e-4)
    assert abs(float(levels[log.argmax()]) - 0.3) < 1 / 127.5


def test_losses_refuse_what_does_not_fit():
    diffusion, x, t = Diffusion(), torch.zeros(1, 1, 4, 4), torch.tensor([3])
    with pytest.raises(ValueError, match='learn_sigma=True'):
        hybrid_loss(diffusion, x, x, x, x, t)
    with pytest.raises(ValueError, match='same channels'):
        distillation_loss(torch.zeros(1, 2, 4, 4), x)
