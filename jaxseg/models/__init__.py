"""Networks. A new head is a module here and a line in `HEADS`."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn

from jaxseg.models.guided import GuidedDecoder
from jaxseg.models.linear import LinearProbe
from jaxseg.models.pac import PacCourse, PacJointUpsample

# Each makes a module from the number of output logits.
HEADS: dict[str, Callable[..., nn.Module]] = {
    "linear": LinearProbe,
    "bilinear": partial(LinearProbe, resize="bilinear"),
    "pac_course": PacCourse,
    "pac_joint": PacJointUpsample,
    "guided": GuidedDecoder,
}
