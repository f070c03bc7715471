"""Networks. A new head is a module here and a line in `HEADS`."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn

from jaxseg.heads.attention import ClassAttention
from jaxseg.heads.deeplab import DeepLabV3, DeepLabV3Plus
from jaxseg.heads.guided import GuidedDecoder
from jaxseg.heads.linear import LinearProbe
from jaxseg.heads.pac import PacCourse, PacJointUpsample

# By task. Each makes a module: from the number of output logits, or of classes to be asked for.
HEADS: dict[str, dict[str, Callable[..., nn.Module]]] = {
    "segmentation": {
        "linear": LinearProbe,
        "bilinear": partial(LinearProbe, resize="bilinear"),
        "pac_course": PacCourse,
        "pac_joint": PacJointUpsample,
        "guided": GuidedDecoder,
    },
    "multiclass": {
        "linear": partial(LinearProbe, resize="bilinear", norm=True),
        "guided": GuidedDecoder,
        "deeplabv3": DeepLabV3,
        "deeplabv3plus": DeepLabV3Plus,
    },
    "attention": {"attention": ClassAttention},
}
