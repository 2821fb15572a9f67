"""Puts the demo and the weights into the wheel, so that `pip install vishub[app]` works without a checkout."""
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == 'editable':  # an editable install reads app/ and weights/ where they lie
            return
        for folder, target in (('app', 'vishub/_app'), ('weights', 'vishub/_weights')):
            path = Path(self.root, folder)
            if path.is_dir():
                build_data['force_include'][str(path)] = target
