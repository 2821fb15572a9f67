"""Every family of models, one file each. Importing this package registers them all with timm."""
from vishub.models import (
    astr,  # noqa: F401
    bactrack,  # noqa: F401
    conslide,  # noqa: F401
    deeprftv2,  # noqa: F401
    dit,  # noqa: F401
    favit,  # noqa: F401
    fcaformer,  # noqa: F401
    fmvit,  # noqa: F401
    lit,  # noqa: F401
    mambaclinix,  # noqa: F401
    nvit,  # noqa: F401
    predformer,  # noqa: F401
    vit,  # noqa: F401
)
