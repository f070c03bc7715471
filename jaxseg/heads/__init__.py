"""Heads: from a backbone's features and the image to logits. A new one is a file here and a line in `_Heads`.

A head is a Flax module `head(features, image_BxHxWx3, train=...) -> (logits, extras)`: features are a map
`B x h x w x C`, or, where the class says `several_maps = True`, a mapping of maps by their stride; the image
is in [0, 1]; logits are float32 `B x H x W x K`, K the field `outputs`. The logits alone will do where there
are no extras. Its fields made by `jaxseg.options.option` are its section of `config.head`.

Two more class attributes tell what a head is for: `asks = True` where the call takes `query_B`, the class
that is asked for among the field `classes`; `coarse = True` where it is trained on its extra `coarse`,
logits of the token grid, which one object class alone allows. A property `solved` may name parameters
that are solved for (`jaxseg.heads.solved`).
"""

import flax.linen as nn

from jaxseg.heads.solved import Solved
from jaxseg.options import listed


class _Heads:
    # The simplest first: a task's first is its default.
    # isort: off
    from jaxseg.heads.linear import LinearProbe as linear
    from jaxseg.heads.linear import BilinearProbe as bilinear
    from jaxseg.heads.linear import NormalizedProbe as linear_norm
    from jaxseg.heads.pac import PacCourse as pac_course
    from jaxseg.heads.pac import PacJointUpsample as pac_joint
    from jaxseg.heads.guided import GuidedDecoder as guided
    from jaxseg.heads.deeplab import DeepLabV3 as deeplabv3
    from jaxseg.heads.deeplab import DeepLabV3Plus as deeplabv3plus
    from jaxseg.heads.attention import ClassAttention as attention


# By their names in configs.
HEADS: dict[str, type[nn.Module]] = listed(_Heads)
# By their own names, as in `jaxseg.heads.DeepLabV3Plus`.
globals().update({head.__name__: head for head in HEADS.values()})


def takes_several_maps(head: nn.Module) -> bool:
    """Whether a head gets all maps of a backbone, by their stride."""
    return getattr(head, "several_maps", False)


def solved_of(head: nn.Module) -> Solved | None:
    """What a head leaves to be solved for; None for nothing."""
    return getattr(head, "solved", None)


def heads_that(*, ask: bool, coarse: bool) -> tuple[str, ...]:
    """Names of the heads that are asked for a class, or not; with those of a coarse output, or without."""
    return tuple(
        name
        for name, head in HEADS.items()
        if getattr(head, "asks", False) == ask and (coarse or not getattr(head, "coarse", False))
    )
