"""The denoiser of the golden diffusion cases, and a tiny trained-looking model for the tests of the task."""
import numpy as np
import torch
import torch.nn.functional as F


def toy_denoiser(state_dict):
    """(x, original timestep (B,)) -> noise and variance, as `meta.network` of the golden cases says."""
    def denoise(x, t):
        h = torch.tanh(F.conv2d(x, state_dict['conv.weight'], state_dict['conv.bias'], padding=1))
        channels = x.shape[1]
        t = torch.as_tensor(t).float().reshape(-1, 1, 1, 1)
        return torch.cat([0.1 * h[:, :channels] + t / 1000 * x, h[:, channels:]], dim=1)
    return denoise


def golden_noise(shape, seed):
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, dtype=np.float32))
