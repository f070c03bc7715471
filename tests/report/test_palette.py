"""Colours that PASCAL VOC's development kit gives its classes."""

import numpy as np

from jaxseg.report.palette import colorize, overlay_classes, palette


def test_colours_of_voc():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128)}
    known |= {20: (0, 64, 128), 255: (224, 224, 192)}
    for number, color in known.items():
        assert tuple(palette()[number]) == color
    assert len(np.unique(palette(), axis=0)) == 256


def test_void_is_drawn_and_background_stays_clear():
    mask = np.array([[0, 1, 255]], np.uint8)
    assert tuple(colorize(mask)[0, 2]) == (224, 224, 192)
    image = np.full((1, 3, 3), 100, np.uint8)
    shown = overlay_classes(image, mask, clear=0, opacity=1.0)
    np.testing.assert_array_equal(shown[0], [[100] * 3, [128, 0, 0], [100] * 3])
    everything = overlay_classes(image, mask, clear=None, opacity=1.0)
    np.testing.assert_array_equal(everything[0], [[0] * 3, [128, 0, 0], [100] * 3])
