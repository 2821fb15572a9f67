"""diffusers' solvers as this task sets them up, against the official loops of DiT."""
import pytest
import torch

from tests.models.official_weights import load_case
from tests.tasks.generation.toy import golden_noise, toy_denoiser
from vishub import InputError
from vishub.tasks.generation.diffusion import Diffusion
from vishub.tasks.generation.sampling import SOLVERS, draw_noise, make_scheduler, sample, sampling_steps


def test_golden_ancestral_sampling(monkeypatch):
    case = load_case('lit', 'diffusion_ancestral_10')
    given = case.inputs['step_noise']
    drawn = iter(golden_noise(given['shape'], given['first_seed'] + step) for step in range(10))
    monkeypatch.setattr('diffusers.schedulers.scheduling_ddpm.randn_tensor', lambda *_, **__: next(drawn))
    scheduler = make_scheduler('ddpm', 10)
    assert scheduler.timesteps.tolist() == case.meta['timestep_map'][::-1]
    case.check('sample', sample(toy_denoiser(case.state_dict), case.inputs['x_T'], scheduler), atol=1e-4)


def test_golden_ddim_sampling():
    case = load_case('lit', 'diffusion_ddim_20')
    scheduler = make_scheduler('ddim', 20)
    assert scheduler.timesteps.tolist() == case.meta['timestep_map'][::-1]
    case.check('sample', sample(toy_denoiser(case.state_dict), case.inputs['x_T'], scheduler), atol=1e-4)


def test_golden_ddim_steps():
    case = load_case('lit', 'diffusion_1000_steps')
    x, noise, denoise = case.inputs['x'], case.inputs['noise'], toy_denoiser(case.state_dict)
    steps = {'ddim_eta0': [], 'ddim_eta': []}
    for item, t in enumerate(case.inputs['t_index']):
        one = x[item:item + 1]
        output = denoise(one, torch.tensor([t]))[:, :4]
        for name, eta in (('ddim_eta0', 0.), ('ddim_eta', case.inputs['eta'])):
            # the official code adds no noise at the last step; there sigma is 0 here, too
            steps[name].append(make_scheduler('ddim', 1000).step(
                output, t, one, eta=eta, variance_noise=noise[item:item + 1]).prev_sample)
    for name, values in steps.items():
        case.check(name, torch.cat(values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('solver', SOLVERS)
def test_a_perfect_denoiser_finds_the_picture(solver):
    """The noise that leads to one fixed picture: every solver must end at that picture."""
    diffusion, picture = Diffusion(), torch.tensor([[0.5, -0.25], [1., -1.]]).expand(2, 1, 2, 2)

    def denoise(x, t):
        signal = diffusion.alphas_cumprod[int(t)].float()
        noise = (x - signal.sqrt() * picture) / (1 - signal).sqrt()
        return torch.cat([noise, -torch.ones_like(noise)], dim=1)

    noise, generators = draw_noise((1, 2, 2), [3, 4])
    states = list(sampling_steps(denoise, noise, make_scheduler(solver, 10, clip=True), generators, clip=True))
    assert [state.step for state in states] == list(range(1, 11)) and states[0].num_steps == 10
    torch.testing.assert_close(states[-1].x, picture, rtol=0, atol=0.02)
    torch.testing.assert_close(states[0].x_start, picture, rtol=0, atol=1e-3)


def test_noise_belongs_to_the_seed():
    alone, _ = draw_noise((2, 4, 4), [7])
    beside, _ = draw_noise((2, 4, 4), [5, 7, 7])
    torch.testing.assert_close(alone[0], beside[1], rtol=0, atol=0)
    torch.testing.assert_close(beside[1], beside[2], rtol=0, atol=0)
    assert not torch.equal(beside[0], beside[1])


@pytest.mark.parametrize('solver, steps, words', [
    ('euler', 10, 'dpm\\+\\+, ddim, ddpm'), ('dpm++', 1, '2 to 1000'), ('ddpm', 1001, '2 to 1000'),
    ('ddim', 30, 'divisor of 1000, as 25')])
def test_bad_settings(solver, steps, words):
    with pytest.raises(InputError, match=words):
        make_scheduler(solver, steps)
