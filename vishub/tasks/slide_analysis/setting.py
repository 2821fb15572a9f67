"""What weights must say besides their tensors so that a slide can be given to them: tasks, encoder, tiling."""
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

from vishub.tasks.slide_analysis.tissue import Tiling

__all__ = ['SlideSetting']

# timm's pretrained_cfg has a fixed set of entries; `notes` is the one for what it has no name for.
_PREFIX = 'vishub.slide_analysis: '


@dataclass(frozen=True)
class SlideSetting:
    """Attributes:
        tasks: Name -> classes, in the order of the class numbers.
        encoder: Name for `load_encoder`; None if the weights do not say.
        encoder_size: Side of its pictures; None for its own.
        tiling: How slides are cut.
    """
    tasks: Mapping[str, Tuple[str, ...]]
    encoder: Optional[str] = None
    encoder_size: Optional[int] = None
    tiling: Tiling = field(default_factory=Tiling)

    @property
    def classes(self) -> List[str]:
        """All classes, by number."""
        return [label for labels in self.tasks.values() for label in labels]

    def numbers(self, task: str) -> List[int]:
        """Class numbers of a task."""
        first = 0
        for name, labels in self.tasks.items():
            if name == task:
                return list(range(first, first + len(labels)))
            first += len(labels)
        raise KeyError(task)

    def note(self) -> str:
        """As one entry of `pretrained_cfg['notes']`."""
        content: Dict[str, Any] = {
            'tasks': {name: list(labels) for name, labels in self.tasks.items()}, 'encoder': self.encoder,
            'encoder_size': self.encoder_size, 'tiling': asdict(self.tiling)}
        return _PREFIX + json.dumps(content)

    @classmethod
    def of(cls, cfg: Mapping[str, Any], num_classes: int) -> 'SlideSetting':
        """Read it from a `pretrained_cfg`; without a note one task of numbered classes, and no encoder."""
        for note in cfg.get('notes') or ():
            if note.startswith(_PREFIX):
                content = json.loads(note[len(_PREFIX):])
                return cls(
                    {name: tuple(labels) for name, labels in content['tasks'].items()}, content['encoder'],
                    content['encoder_size'], Tiling(**content['tiling']))
        names = cfg.get('label_names') or [f'class {number}' for number in range(num_classes)]
        return cls({'all': tuple(names)})
