"""The tables of docs/interop.md are those of `matrix.py`, and no family is missing. Runs with every suite."""
import matrix
import timm

import vishub  # noqa: F401
from vishub import catalog


def test_the_page_shows_the_tables():
    _, between, _ = matrix.parts(matrix.PAGE.read_text(encoding='utf-8'))
    assert between.strip() == matrix.tables(), 'run: python tests/interop/matrix.py'


def test_every_family_of_classifiers_is_there():
    families = {row.family for row in catalog.architectures('classification')}
    assert families == {catalog.find(name).family for name in matrix.SUBJECTS}
    assert set(matrix.PYRAMIDS) < set(matrix.SUBJECTS)
    assert all(timm.is_model(name) for name in matrix.SUBJECTS)


def test_limits_are_of_the_tables():
    cells = {(name, way) for name in matrix.SUBJECTS for way in matrix.WAYS}
    cells |= {(name, decoder) for name in matrix.PYRAMIDS for decoder in matrix.DECODERS}
    assert set(matrix.LIMITS) <= cells
