"""Golden cases: outputs of the papers' official code, for weights drawn from the weights' official names.

`tests/golden/<family>/<case>.json` says how weights and inputs were made, `<case>.npz` holds the outputs. Nothing was
stored but the recipe, so a test makes the weights again, converts them with the family's `checkpoint_filter_fn`, runs
the model, and compares.
"""
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Sequence

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / 'golden'

# leaves of one or no dimension that multiply, and therefore lie around 1
_FACTORS = {'weight', 'D', 'Ds', 'gamma', 'scale', 'temperature'}


def official_value(name: str, shape: Sequence[int]) -> np.ndarray:
    """The value (float32) that the golden data gave to the official parameter or buffer `name`."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    leaf = name.rpartition('.')[2]
    if len(shape) == 0:
        noise = np.asarray(np.float32(rng.standard_normal()))
    else:
        noise = rng.standard_normal(tuple(shape), dtype=np.float32)
    if leaf == 'running_var':
        value = 1 + 0.1 * np.abs(noise)
    elif leaf in ('A_log', 'A_logs'):
        value = 0.5 * np.abs(noise)
    elif len(shape) < 2:
        value = 0.1 * noise + (1 if leaf in _FACTORS else 0)
    elif shape[0] == 1 and len(shape) >= 3:
        value = 0.1 * noise
    else:
        value = noise / np.sqrt(np.prod(shape[1:]))
    return np.asarray(value, dtype=np.float32)


@dataclass(frozen=True)
class GoldenCase:
    """One golden case.

    Attributes:
        state_dict: Official names -> values. Integer entries are left out: the constructor gives them.
        inputs: Arguments by name, tensors (float32) where the case drew them.
        meta: Constructor, its arguments, what the outputs are.
    """
    name: str
    parameters: int
    state_dict: Dict[str, torch.Tensor]
    inputs: Dict[str, Any]
    meta: Dict[str, Any]
    outputs: Dict[str, Dict[str, Any]]
    arrays: Dict[str, np.ndarray]

    def check(self, output: str, value: torch.Tensor, rtol: float = 0., atol: float = 1e-4) -> None:
        """Assert that `value` is the official output, at the entries that were stored (or the case's tolerance)."""
        expected = self.outputs[output]
        tolerance = self.meta.get('tolerance')
        if isinstance(tolerance, dict):
            rtol, atol = tolerance.get('rtol', rtol), tolerance.get('atol', atol)
            atol = atol[output] if isinstance(atol, dict) else atol
        elif tolerance is not None:
            rtol, atol = 0., float(tolerance)
        assert list(value.shape) == expected['shape'], f'{output}: {list(value.shape)}, not {expected["shape"]}'
        got = value.detach().float().cpu().numpy().reshape(-1)[::expected['stride']]
        np.testing.assert_allclose(
            got, self.arrays[output].reshape(-1), rtol=rtol, atol=atol, err_msg=f'{self.name}: {output}')


def load_case(family: str, name: str) -> GoldenCase:
    """Read `tests/golden/<family>/<name>`."""
    path = GOLDEN / family / f'{name}.json'
    case = json.loads(path.read_text())
    meta = case.get('meta', {})
    state_dict = {
        key: torch.from_numpy(official_value(key, shape))
        for key, (shape, dtype) in case['state_dict'].items() if dtype.startswith('float')
    }
    for key, value in meta.get('overrides', {}).items():
        state_dict[key] = torch.as_tensor(value, dtype=torch.float32).broadcast_to(state_dict[key].shape).clone()
    inputs = {key: _input_value(value) for key, value in case['inputs'].items()}
    with np.load(path.with_suffix('.npz')) as arrays:
        arrays = dict(arrays)
    return GoldenCase(name, case['parameters'], state_dict, inputs, meta, case['outputs'], arrays)


def _input_value(recipe: Any) -> Any:
    if not isinstance(recipe, dict) or 'seed' not in recipe:
        return recipe
    rng = np.random.Generator(np.random.PCG64(recipe['seed']))
    return torch.from_numpy(rng.standard_normal(recipe['shape'], dtype=np.float32))
