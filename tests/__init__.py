"""A package, so that the `tests` that torch-fidelity installs does not hide it."""
