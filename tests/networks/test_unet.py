"""U-Net: golden outputs of PyTorch definitions, published counts and sizes, mirroring, VGG-16."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from shared import shared_path

from jaxseg.networks.unet import ContractingPath, UNet, UpConvolution, max_pool
from jaxseg.options import OptionError, options
from jaxseg.weights import safetensors_file

FORMS = {
    "same": UNet(2, width=4, depth=2),
    "valid": UNet(2, width=4, depth=2, padding="valid", norm="none", dropout=0.5),
    "vgg16": UNet(2, width=2, depth=2, encoder="vgg16", norm="group"),
    "vgg16 valid": UNet(2, width=2, depth=2, encoder="vgg16", padding="valid", norm="none"),
}
forms = pytest.mark.parametrize("net", FORMS.values(), ids=FORMS.keys())


def from_torch(tensors):
    """Flax variables of a state dict with names `down.{level}.{index}`, `up.{n}`, `conv.{n}`, `classifier`.

    Levels of `down` run from shallow to deep, `up` and `conv` from deep to shallow. A level is
    convolution, (norm,) ReLU, twice.
    """
    tree = {"params": {}, "batch_stats": {}}
    depth = sum(name.startswith("up.") and name.endswith("weight") for name in tensors)
    step = 3 if "down.0.1.running_var" in tensors else 2
    stats = {"running_mean": "mean", "running_var": "var"}
    for name, value in tensors.items():
        part, *numbers, field = name.split(".")
        if part == "classifier":
            path = ["classify"]
            value = value[:, :, 0, 0].T if value.ndim == 4 else value
        elif part == "up":
            path = ["expanding", f"up{depth - int(numbers[0])}"]
            value = value.transpose(2, 3, 0, 1) if value.ndim == 4 else value
        else:
            level, index = map(int, numbers)
            level = level + 1 if part == "down" else depth - level
            kind = "norm" if index % step else "conv"
            path = ["contracting" if part == "down" else "expanding"]
            path += [f"{kind}{level}_{1 + index // step}"]
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        node = tree["batch_stats" if field in stats else "params"]
        for key in path:
            node = node.setdefault(key, {})
        scale = "scale" if path[-1].startswith("norm") else "kernel"
        node[stats.get(field) or (scale if field == "weight" else field)] = jnp.asarray(value)
    return {k: v for k, v in tree.items() if v}


def _shapes(tree):
    return jax.tree.map(lambda x: x.shape, tree)


def _abstract(net, channels=3):
    """Shapes of the variables; nothing is computed."""
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, channels)))


def _init(net, image, seed=0):
    return jax.jit(net.init)(jax.random.key(seed), image)


def _apply(net, variables, image, **options):
    return jax.jit(partial(net.apply, **options))(variables, image)


def _images(seed, *shape):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


@pytest.mark.parametrize("padding,norm", [("same", "batch"), ("valid", "none")])
def test_logits_are_those_of_the_independent_definition(padding, norm):
    golden = np.load(shared_path(f"golden/zoo/unet_{padding}.npz"))
    variables = from_torch({k[2:]: golden[k] for k in golden if k.startswith("w/")})
    net = UNet(5, padding=padding, norm=norm, width=2)
    assert _shapes(variables) == _shapes(_abstract(net))
    for i in range(sum(k.startswith("x") for k in golden)):
        x, y = (golden[f"{name}{i}"].transpose(0, 2, 3, 1) for name in "xy")
        logits = _apply(net, variables, x, method="tile")
        assert logits.shape == y.shape
        np.testing.assert_allclose(logits, y, rtol=0, atol=1e-4 * np.abs(y).max())


# `spec/zoo.md`, section 4: (form, channels of the image, classes).
COUNTS = [
    ("valid", "none", 1, 2, 31_030_658),
    ("valid", "none", 3, 2, 31_031_810),
    ("valid", "none", 3, 11, 31_032_395),
    ("valid", "none", 3, 21, 31_033_045),
    ("same", "batch", 3, 1, 31_037_633),
    ("same", "batch", 3, 2, 31_037_698),
]


@pytest.mark.parametrize("padding,norm,channels,outputs,count", COUNTS)
def test_parameters_are_as_many_as_published(padding, norm, channels, outputs, count):
    params = _abstract(UNet(outputs, padding=padding, norm=norm), channels)["params"]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == count


def test_options_are_all_fields_but_the_number_of_outputs():
    assert list(options(UNet)) == ["padding", "width", "depth", "norm", "dropout", "encoder"]
    for name, option in options(UNet).items():
        assert option.fits(option.default) and option.default == getattr(UNet(), name)


def test_valid_sizes_are_the_published_ones():
    net = UNet(2, padding="valid", norm="none", width=1)
    assert (net.margin, net.multiple) == (92, 1)
    assert (UNet().margin, UNet().multiple) == (0, 1)

    def tile(size):
        x = jnp.zeros((1, size, 188, 1))
        out, _ = jax.eval_shape(partial(net.init_with_output, method="tile"), jax.random.key(0), x)
        return out.shape

    assert tile(572) == (1, 388, 4, 2)
    assert tile(588) == (1, 404, 4, 2)
    for size in (184, 172, 570, 580):
        with pytest.raises(ValueError, match="multiples of 16 plus 12, above 184"):
            tile(size)


def _mirrored(n, before, after):
    """Indices of n pixels to and fro between the first and the last, from -before to n + after."""
    i = np.arange(-before, n + after) % max(1, 2 * (n - 1))
    return np.where(i < n, i, 2 * (n - 1) - i)


@pytest.mark.parametrize(
    "name,size", [("valid", (1, 2)), ("valid", (33, 22)), ("vgg16 valid", (5, 3))]
)
def test_valid_logits_are_those_of_a_mirrored_tile(name, size):
    net = FORMS[name]
    image = _images(0, 2, *size, 3)
    variables = _init(net, image)
    # Shrinks by hand, at depth 2: per level 2 (or 3) convolutions of 2 pixels, and 2 on the way up.
    shrinks = {"valid": 4 + 8 + 16 + 8 + 4, "vgg16 valid": 4 + 8 + 24 + 8 + 4}
    margin = shrinks[name] // 2
    assert net.margin == margin
    # A result is a multiple of 4, at depth 2.
    rows, columns = (_mirrored(n, margin, margin + -n % 4) for n in size)
    tile = _apply(net, variables, image[:, rows][:, :, columns], method="tile")
    assert tile.shape == (2, *(n + -n % 4 for n in size), 2)
    logits, extras = _apply(net, variables, image)
    assert extras == {} and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, tile[:, : size[0], : size[1]], rtol=1e-6, atol=1e-6)


def test_a_valid_logit_depends_on_the_margin_and_no_further():
    net = FORMS["valid"]
    size = 2 * net.margin + 4
    image = jnp.asarray(_images(1, 1, size, size, 3))
    variables = _init(net, image, seed=1)

    @jax.jit
    @jax.grad
    def change(x):
        return jnp.sum(net.apply(variables, x, method="tile")[0, 0, 0])

    rows = np.flatnonzero(np.abs(change(image)[0]).sum((1, 2)))
    # The logit of the tile's first pixel lies `margin` pixels inside.
    assert rows[0] <= 1 and net.margin < rows[-1] < 2 * net.margin + 4


@forms
def test_odd_sizes_training_and_gradients(net):
    image = jnp.asarray(_images(2, 2, 21, 34, 3))
    net = net.clone(dropout=0.5)
    variables = _init(net, image)

    @jax.jit
    def step(params, key):
        def loss(params):
            (logits, extras), state = net.apply(
                {**variables, "params": params},
                image,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return jnp.mean(jax.nn.softplus(-logits)), (logits, extras, state)

        return jax.grad(loss, has_aux=True)(params)

    grads, (logits, extras, state) = step(variables["params"], jax.random.key(1))
    assert logits.shape == (2, 21, 34, 2) and logits.dtype == jnp.float32 and extras == {}
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.any(grad), path
    assert jax.tree.structure(state.get("batch_stats")) == jax.tree.structure(
        variables.get("batch_stats")
    )
    # Dropout is of training only.
    other = step(variables["params"], jax.random.key(2))[1][0]
    assert not np.array_equal(logits, other)
    logits, _ = _apply(net, variables, image)
    assert logits.shape == (2, 21, 34, 2) and logits.dtype == jnp.float32


def test_statistics_are_those_of_the_batch_and_move_by_a_tenth():
    net = FORMS["same"]
    image = _images(3, 2, 8, 8, 3)
    variables = _init(net, image)
    _, new = _apply(net, variables, image, train=True, mutable=["batch_stats"])
    kernel = variables["params"]["contracting"]["conv1_1"]["kernel"]
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = sum(padded[:, i : i + 8, j : j + 8] @ kernel[i, j] for i in range(3) for j in range(3))
    stats = new["batch_stats"]["contracting"]["norm1_1"]
    np.testing.assert_allclose(stats["mean"], 0.1 * x.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x.var((0, 1, 2)), atol=1e-5)


def test_dropout_is_at_the_end_of_the_contracting_path():
    levels = ((2, 1), (2, 1), (2, 1))
    plain, dropped = (ContractingPath(levels, "same", "none", rate) for rate in (0.0, 0.9))
    image = _images(4, 1, 16, 16, 3)
    variables = plain.init(jax.random.key(0), image)
    rngs = {"dropout": jax.random.key(1)}
    maps = zip(
        plain.apply(variables, image, train=True),
        dropped.apply(variables, image, train=True, rngs=rngs),
        strict=True,
    )
    assert [bool(np.array_equal(a, b)) for a, b in maps] == [True, False, False]


def test_one_pixel_at_the_bottom_is_trained_without_zeros():
    # The deepest map of one image of 4 x 4 is one pixel; its batch statistics would make it 0.
    net = FORMS["same"]
    image = _images(5, 1, 4, 4, 3)
    variables = _init(net, image)
    _, new = _apply(net, variables, image, train=True, mutable=["batch_stats"])
    deepest = new["batch_stats"]["contracting"]["norm3_2"]
    np.testing.assert_array_equal(deepest["var"], 1.0)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(padding="zero"), "padding is 'zero'; allowed: 'same', 'valid'"),
        (dict(norm="layer"), "norm is 'layer'; allowed: 'batch', 'group', 'none'"),
        (dict(encoder="vgg19"), "encoder is 'vgg19'; allowed: '', 'vgg16'"),
        (dict(encoder="vgg16", depth=5), "depth is 5; allowed with vgg16: at most 4"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(OptionError, match=f"^{message}"):
        _abstract(UNet(width=2, **options))


def test_an_image_that_would_vanish_is_refused():
    with pytest.raises(ValueError, match="an image of 32 pixels: with depth 6 allowed are 64"):
        _abstract(UNet(width=2, depth=6))


def _vgg16():
    """The released convolutions as {name: {"kernel", "bias"}}."""
    tensors = safetensors_file.read(shared_path("weights/vgg16_features_fp16.safetensors"))
    indices = sorted({int(name.split(".")[1]) for name in tensors})
    names = [f"conv{i}_{j}" for i, n in enumerate((2, 2, 3, 3, 3), 1) for j in range(1, n + 1)]
    tree = {}
    for name, index in zip(names, indices, strict=True):
        kernel, bias = (tensors[f"features.{index}.{part}"] for part in ("weight", "bias"))
        tree[name] = {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias}
    return jax.tree.map(lambda x: x.astype(np.float32), tree)


def test_vgg16_is_the_contracting_path_of_its_name():
    params = _abstract(UNet(2, encoder="vgg16"))["params"]["contracting"]
    # `spec/zoo.md`, section 0.
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == 14_714_688
    convolutions = _vgg16()
    assert _shapes(params) == _shapes(convolutions)
    file = shared_path("data/camvid/val/images/0016E5_07959.jpg")
    image = np.asarray(Image.open(file), np.float32)[None] / 255
    levels = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    path = ContractingPath(levels, padding="same", norm="none", dropout=0.0)
    x = (image - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    maps = jax.jit(path.apply)({"params": convolutions}, x.astype(np.float32))
    # What the spec gives for pool3, pool4 and pool5 on a CamVid image.
    deviations = [float(jnp.std(max_pool(x))) for x in maps[2:]]
    np.testing.assert_allclose(deviations, [4.3, 2.1, 0.75], rtol=0.05)


def test_vgg16_sees_images_as_it_was_trained():
    net = FORMS["vgg16"]
    image = _images(6, 1, 16, 16, 3)
    variables = _init(net, image)
    _, seen = net.apply(
        variables, image, capture_intermediates=lambda module, _: module.name == "contracting"
    )
    seen = seen["intermediates"]["contracting"]["__call__"][0]
    levels = ((2, 2), (4, 2), (8, 3))
    path = ContractingPath(levels, padding="same", norm="none", dropout=0.0)
    x = (image - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    maps = path.apply({"params": variables["params"]["contracting"]}, x.astype(np.float32))
    for a, b in zip(maps, seen, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3)])
def test_pooling_is_xlas_with_equal_pixels_too(size):
    x = jnp.maximum(0, _images(7, 2, *size, 3) - 0.5)
    weight = _images(8, 2, size[0] // 2, size[1] // 2, 3)

    def both(pool):
        return pool(x), jax.grad(lambda x: jnp.sum(weight * pool(x)))(x)

    expected = both(partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2)))
    jax.tree.map(np.testing.assert_array_equal, both(max_pool), expected)


def test_up_convolution_and_its_gradients_are_those_of_flax():
    x = _images(8, 2, 3, 5, 4)
    up, flax = UpConvolution(6), nn.ConvTranspose(6, (2, 2), strides=(2, 2), padding="VALID")
    params = up.init(jax.random.key(0), x)["params"]
    params["bias"] = jnp.arange(6.0)
    # Flax's kernel lies the other way round.
    turned = {**params, "kernel": params["kernel"][::-1, ::-1]}
    np.testing.assert_allclose(
        up.apply({"params": params}, x), flax.apply({"params": turned}, x), atol=1e-5
    )

    def change(module, params):
        def loss(params, x):
            return jnp.sum(jnp.sin(module.apply({"params": params}, x)))

        return jax.grad(loss, (0, 1))(params, x)

    (params_a, x_a), (params_b, x_b) = change(up, params), change(flax, turned)
    params_b["kernel"] = params_b["kernel"][::-1, ::-1]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), params_a, params_b)
    np.testing.assert_allclose(x_a, x_b, atol=1e-5)
