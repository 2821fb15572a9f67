"""Every family of models, one file each. Importing this package registers them all with timm."""
from vishub.models import favit  # noqa: F401
from vishub.models import fcaformer  # noqa: F401
from vishub.models import fmvit  # noqa: F401
from vishub.models import nvit  # noqa: F401
