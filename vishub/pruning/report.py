"""What a pruning run did: sizes, savings and accuracies before and after, as data and as a picture."""
import dataclasses
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

from vishub.errors import import_extra
from vishub.files import atomic_path
from vishub.pruning.structure import BLOCK_KINDS

__all__ = ['PruningReport']

_TITLES = {'head': 'heads', 'QK': 'query/key size', 'V': 'value size', 'MLP': 'MLP width'}


@dataclasses.dataclass(frozen=True)
class PruningReport:
    """The figures of a pruning run.

    Attributes:
        target: What was asked for, e.g. `{'latency': 0.5}` (shares of the unpruned model).
        reached: The same figure of the pruned model: for latency as the table predicts it.
        dims_before, dims_after: Sizes (`EMB`, and per block `head`, `QK`, `V`, `MLP`).
        macs: Multiply-accumulates of an image, before and after.
        params: Parameters, before and after.
        seconds: Measured median time of a batch on this device, before and after; None where it was not asked for.
        accuracy: Top-1 in per cent of the `original`, `masked` (dead units zero) and `dense` model, without
            fine-tuning after the last step. Masked and dense differ where the embedding shrank. `stored`, where there
            is one, is the model as it was saved, after fine-tuning.
        batches: Batches used in all.
        history: One entry a pruning step: `batch`, `loss`, `cost` (share), `dims`.
    """
    target: Dict[str, float]
    reached: float
    dims_before: Dict[str, Any]
    dims_after: Dict[str, Any]
    macs: Tuple[int, int]
    params: Tuple[int, int]
    seconds: Optional[Tuple[float, float]]
    accuracy: Dict[str, float]
    batches: int
    history: List[Dict[str, Any]]

    def to_dict(self) -> Dict[str, Any]:
        """All of it as JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def table(self) -> str:
        """Sizes before and after, as Markdown, a row a block."""
        before, after = self.dims_before, self.dims_after
        lines = ['| block | ' + ' | '.join(_TITLES[kind] for kind in BLOCK_KINDS) + ' |', '|---' * 5 + '|']
        for index in range(len(before['head'])):
            cells = (f'{before[kind][index]} → {after[kind][index]}' for kind in BLOCK_KINDS)
            lines.append(f'| {index} | ' + ' | '.join(cells) + ' |')
        return f'Embedding {before["EMB"]} → {after["EMB"]}\n\n' + '\n'.join(lines) + '\n'

    def plot(self, path: Union[str, Path]) -> Path:
        """Draw the remaining sizes per block over the original ones into an image file; gives its path.

        Raises:
            MissingExtraError: If matplotlib is not installed.
        """
        import_extra('matplotlib', 'train')
        from matplotlib.figure import Figure

        path = Path(path)
        figure = Figure(figsize=(12, 3.2), layout='constrained')
        blocks = range(len(self.dims_before['head']))
        for axis, kind in zip(figure.subplots(1, len(BLOCK_KINDS)), BLOCK_KINDS):
            axis.bar(blocks, self.dims_before[kind], color='#d9d9d9', label='before')
            axis.bar(blocks, self.dims_after[kind], color='#2b6cb0', label='after')
            axis.set_title(_TITLES[kind])
            axis.set_xlabel('block')
            axis.set_xticks(list(blocks))
        axis.legend(fontsize='small')
        (what, asked), = self.target.items()
        figure.suptitle(
            f'embedding {self.dims_before["EMB"]} → {self.dims_after["EMB"]}, '
            f'{what} {self.reached:.2f} of the original (asked for {asked:.2f})')
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=120)
        return path

    def save(self, folder: Union[str, Path]) -> None:
        """Write `pruning.json`, `pruning.md` and `pruning.png` to a folder."""
        folder = Path(folder)
        with atomic_path(folder / 'pruning.json') as path:
            path.write_text(json.dumps(self.to_dict(), indent=2) + '\n', encoding='utf-8')
        with atomic_path(folder / 'pruning.md') as path:
            path.write_text(self.table(), encoding='utf-8')
        self.plot(folder / 'pruning.png')
