"""Trackers that need no weights, under the same protocol: what a learned one should beat."""
from typing import Any, Callable, Dict, Optional, Tuple

import numpy as np

from vishub.errors import InputError, MissingExtraError, import_extra
from vishub.tasks.tracking.crops import as_image, check_box
from vishub.tasks.tracking.tracker import AnyTracker

__all__ = ['FirstBox', 'OpenCVTracker', 'TemplateMatching', 'peers']


class FirstBox:
    """Says that the target never moves."""

    def init(self, image: Any, box: Any) -> None:
        pixels = as_image(image)
        self._box = check_box(box, pixels.shape[1], pixels.shape[0])

    def update(self, image: Any) -> Tuple[np.ndarray, float]:
        return self._box, 1.


class TemplateMatching:
    """Normalised cross-correlation of the first template, within four times the target's size around the last place.

    The size of the target stays what it was.
    """

    def init(self, image: Any, box: Any) -> None:
        self._cv2 = import_extra('cv2', 'train')
        pixels = as_image(image)
        height, width = pixels.shape[:2]
        self._box = check_box(box, width, height)
        x, y, w, h = self._box.round().astype(int)
        self._template = pixels[max(y, 0):y + max(h, 1), max(x, 0):x + max(w, 1)].copy()

    def update(self, image: Any) -> Tuple[np.ndarray, float]:
        pixels, cv2 = as_image(image), self._cv2
        height, width = self._template.shape[:2]
        reach = round(1.5 * np.sqrt(height * width))
        x, y = self._box[:2].round().astype(int)
        left, top = max(x - reach, 0), max(y - reach, 0)
        region = pixels[top:y + height + reach, left:x + width + reach]
        if region.shape[0] < height or region.shape[1] < width:
            return self._box, 0.
        scores = cv2.matchTemplate(np.ascontiguousarray(region), self._template, cv2.TM_CCOEFF_NORMED)
        _, best, _, (column, row) = cv2.minMaxLoc(scores)
        self._box = np.array([left + column, top + row, *self._box[2:]], np.float64)
        return self._box, float(best)


class OpenCVTracker:
    """One of OpenCV's own, in whole pixels; where it gives up, the last box stays.

    Args:
        make: OpenCV's function that makes it.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def init(self, image: Any, box: Any) -> None:
        pixels = as_image(image)
        self._box = check_box(box, pixels.shape[1], pixels.shape[0])
        self._tracker = self._make()
        self._tracker.init(_bgr(pixels), tuple(int(value) for value in self._box.round()))

    def update(self, image: Any) -> Tuple[np.ndarray, float]:
        found, box = self._tracker.update(_bgr(as_image(image)))
        if found:
            self._box = np.array(box, np.float64)
        return self._box, float(found)


def peers() -> Dict[str, Callable[[], AnyTracker]]:
    """By name, what makes each peer that can be had here: of OpenCV's those that need no file of weights."""
    made: Dict[str, Callable[[], AnyTracker]] = {'first box kept': FirstBox}
    try:
        cv2 = import_extra('cv2', 'train')
    except MissingExtraError:
        return made
    made['template matching (NCC)'] = TemplateMatching
    for kind in ('CSRT', 'KCF', 'MIL'):
        make = _opencv(cv2, kind)
        if make is not None:
            made[f'OpenCV {kind}'] = lambda make=make: OpenCVTracker(make)  # type: ignore[misc]
    return made


def _opencv(cv2: Any, kind: str) -> Optional[Callable[[], Any]]:
    for place in (cv2, getattr(cv2, 'legacy', None)):
        make = getattr(place, f'Tracker{kind}_create', None) or getattr(
            getattr(place, f'Tracker{kind}', None), 'create', None)
        if make is not None:
            return make
    return None


def _bgr(pixels: np.ndarray) -> np.ndarray:
    if min(pixels.shape[:2]) < 2:
        raise InputError(f'OpenCV tracks in no frame of {pixels.shape[1]} x {pixels.shape[0]} pixels')
    return np.ascontiguousarray(pixels[..., ::-1])
