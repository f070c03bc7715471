"""The data formats. A new one is a file here and a line in `_Formats`."""

from jaxseg.data.format import Format
from jaxseg.options import listed


class _Formats:
    # First those that are drawn.
    # isort: off
    from jaxseg.data.drawn.shapes import Shapes as shapes
    from jaxseg.data.drawn.shapes import Scenes as scenes
    from jaxseg.data.drawn.shapes import Kinds as kinds
    from jaxseg.data.formats.binary_masks import BinaryMasks as binary_masks
    from jaxseg.data.formats.class_masks import ClassMasks as class_masks
    from jaxseg.data.formats.coco import Coco as coco
    from jaxseg.data.formats.images import Images as images
    from jaxseg.data.formats.tfds_records import Tfds as tfds


# By their names in configs.
FORMATS: dict[str, type[Format]] = listed(_Formats)
# By their own names, as in `jaxseg.data.formats.ClassMasks`.
globals().update({data.__name__: data for data in FORMATS.values()})
