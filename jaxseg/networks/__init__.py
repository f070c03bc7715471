"""Networks: from images in [0, 1] to logits. A new whole network is a file here and a line in `_Networks`.

The contract is at the head of `jaxseg.networks.network`. Fields made by `jaxseg.options.option` are the
network's section of `config.network`; a field `outputs` is the number of logits per pixel.
"""

import flax.linen as nn

from jaxseg.networks.network import Network
from jaxseg.networks.segmenter import Segmenter
from jaxseg.options import listed

__all__ = ["NETWORKS", "Network", "Segmenter"]


class _Networks:
    from jaxseg.networks.unet import UNet as unet


# By their names in configs.
NETWORKS: dict[str, type[nn.Module]] = listed(_Networks)
# By their own names, as in `jaxseg.networks.UNet`.
globals().update({network.__name__: network for network in NETWORKS.values()})
