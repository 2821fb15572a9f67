"""Every family of models, one file each. Importing this package registers them all with timm."""
from vishub.models import (
    favit,  # noqa: F401
    fcaformer,  # noqa: F401
    fmvit,  # noqa: F401
    nvit,  # noqa: F401
    vit,  # noqa: F401
)
