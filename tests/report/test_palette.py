"""Colours that PASCAL VOC's development kit gives its classes, and ours for errors."""

import numpy as np

from jaxseg.report.palette import (
    ADDED,
    FOUND,
    MISSED,
    colorize,
    error_picture,
    overlay,
    overlay_classes,
    palette,
)


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


def test_errors_of_an_object_by_hand():
    image = np.full((1, 5, 3), 100, np.uint8)
    mask, found = np.array([[0, 0, 1, 1, 255]], np.uint8), np.array([[0, 1, 0, 1, 1]], bool)
    shown = error_picture(image, mask, found)
    np.testing.assert_array_equal(shown[0], [[35] * 3, ADDED, MISSED, [35] * 3, [35] * 3])


def test_overlay_tints_and_outlines():
    image, found = np.zeros((7, 7, 3), np.uint8), np.zeros((7, 7), bool)
    found[1:6, 1:6] = True
    shown = overlay(image, found)
    assert (shown[~found] == 0).all()
    assert (shown[1, 1:6] == 255).all() and (shown[1:6, 5] == 255).all()
    np.testing.assert_array_equal(shown[3, 3], np.array(FOUND) // 2)
    # At the image's border there is no outline: the object goes on.
    assert (overlay(image, np.ones((7, 7), bool))[0, 0] == np.array(FOUND) // 2).all()
