"""The tracker: a box in the first frame, then a box and a score for every further one."""
from typing import Any, NamedTuple, Optional, Protocol, Sequence, Tuple, Union

import numpy as np
import torch

from vishub.errors import InputError
from vishub.models.bactrack import BACTrack
from vishub.tasks.base import choose_device, pretrained_cfg_of
from vishub.tasks.tracking.collection import Collection
from vishub.tasks.tracking.constants import TrackerConstants
from vishub.tasks.tracking.crops import (
    SEARCH_FACTOR,
    TEMPLATE_FACTOR,
    as_image,
    box_in_frame,
    check_box,
    clip_box,
    crop,
    crop_side,
    mean_colour,
)

__all__ = ['AnyTracker', 'Step', 'Tracker']


class AnyTracker(Protocol):
    """What an evaluation needs of a tracker, ours or a peer's."""

    def init(self, image: Any, box: Any) -> None: ...

    def update(self, image: Any) -> Tuple[np.ndarray, float]: ...


class Step(NamedTuple):
    """What the tracker says of one frame.

    Attributes:
        frame: Its number; the initial one is 0.
        box: x, y, w, h in pixels, float64 (4,).
        confidence: Probability of the chosen place, 0 to 1.
        reliability: Whether the box shows the target of the first frame, 0 to 1, by the discriminator.
        num_templates: In the collection behind this frame.
        changed: Whether this frame changed the collection.
    """
    frame: int
    box: np.ndarray
    confidence: float
    reliability: float
    num_templates: int
    changed: bool


class Tracker:
    """Follow one target with a BACTrack-style network.

        tracker = create_tracker()
        tracker.init(first_frame, (x, y, w, h))
        for frame in frames:
            box, score = tracker.update(frame)

    Frames are uint8 RGB of H x W x 3 (or grey of H x W, or PIL images); their size may change. A box is x, y, w, h in
    pixels, top left first. Several trackers may share a network.

    Args:
        model: The network, with its weights.
        device: Where it runs; it is moved there and set to evaluation.
        template_update: `collection`, `latest` or `none`, see `Collection`.
        **options: Fields of `TrackerConstants`; what is not given is what the weights carry, or the field's.

    Raises:
        InputError: If the module is no such network, or an option is out of range.

    Attributes:
        last: The `Step` of the frame seen last; None before `init`.
        collection: The templates.
        constants: What it goes by.
    """

    def __init__(
            self,
            model: BACTrack,
            device: Union[str, torch.device, None] = None,
            *,
            template_update: str = 'collection',
            **options: Any,
    ):
        if not isinstance(model, BACTrack):
            raise InputError(f'a {type(model).__name__} tracks nothing: give a BACTrack, such as bactrack_tiny')
        self.constants = TrackerConstants.of(model, options)
        self.device = choose_device(device)
        self.model = model.to(self.device).eval()
        cfg = pretrained_cfg_of(model)
        self._mean, self._std = (
            torch.tensor(tuple(cfg[key]), device=self.device).view(-1, 1, 1) for key in ('mean', 'std'))
        rows, columns = model.grid_size
        window = np.outer(np.hanning(rows), np.hanning(columns)).ravel()
        self._window = torch.from_numpy(window).float().to(self.device)
        self.collection = Collection(model, self._prepare, template_update, self.constants)
        self.last: Optional[Step] = None
        self._fill = np.zeros(3)

    def init(self, image: Any, box: Union[Sequence[float], np.ndarray]) -> None:
        """Take the target from its box; what was tracked before is forgotten.

        Raises:
            InputError: If the frame or the box cannot be used.
        """
        pixels = as_image(image)
        height, width = pixels.shape[:2]
        first = check_box(box, width, height)
        self._fill = mean_colour(pixels)
        self.collection.start(self._template_crop(pixels, first))
        self.last = Step(0, first, 1., 1., 1, False)

    def update(self, image: Any) -> Tuple[np.ndarray, float]:
        """Find the target in the next frame.

        Returns:
            Its box, float64 (4,), and the confidence, 0 to 1; `last` tells more. There is always a box: where the
            target has left, the score is low.

        Raises:
            RuntimeError: Before `init`.
            InputError: If the frame cannot be used.
        """
        if self.last is None:
            raise RuntimeError('the tracker has no target yet: call init(image, box) first')
        pixels = as_image(image)
        height, width = pixels.shape[:2]
        box = clip_box(self.last.box, width, height, self.constants.min_size)  # the frame's size may have changed
        centre = (box[0] + box[2] / 2, box[1] + box[3] / 2)
        side = crop_side(box[2], box[3], SEARCH_FACTOR)
        found, confidence, reliability = self._search(
            crop(pixels, centre, side, self.model.img_size[0], self._fill))
        box = clip_box(box_in_frame(found, centre, side), width, height, self.constants.min_size)
        number = self.last.frame + 1
        changed = self.collection.offer(reliability, number, lambda: self._template_crop(pixels, box))
        self.last = Step(number, box, confidence, reliability, len(self.collection.templates), changed)
        return box, confidence

    @torch.inference_mode()
    def _search(self, pixels: np.ndarray) -> Tuple[np.ndarray, float, float]:
        """The best box in units of the crop, its confidence and its reliability."""
        x = self.model.encode_search(self._prepare(pixels), self.collection.cache)
        logits, boxes = self.model.forward_head(x)
        share = logits[0].float().softmax(-1)[:, 0]
        influence = self.constants.window_influence
        best = int((share * (1 - influence) + self._window * influence).argmax())
        chosen = boxes[:, best]
        reliability = self.model.discriminate(x, self.collection.cache, chosen).float().sigmoid()
        numbers = torch.cat([chosen[0].float(), share[best, None], reliability]).cpu().numpy()
        return numbers[:4], float(numbers[4]), float(numbers[5])

    def _template_crop(self, pixels: np.ndarray, box: np.ndarray) -> np.ndarray:
        return crop(
            pixels, (box[0] + box[2] / 2, box[1] + box[3] / 2), crop_side(box[2], box[3], TEMPLATE_FACTOR),
            self.model.template_size[0], self._fill)

    def _prepare(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 (h, w, 3) -> normalised (1, 3, h, w) on the device."""
        x = torch.tensor(pixels, device=self.device).permute(2, 0, 1)[None]
        return (x.float() / 255 - self._mean) / self._std
