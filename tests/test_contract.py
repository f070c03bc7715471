"""What everything that is listed promises: a new head, network, backbone, task or data format is tested
by being listed (a loss by `tests/losses`, which asks for its NumPy reference).

Each is tested once, with one partner, and as small as its options and shapes allow.
"""

import dataclasses
import importlib.util
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import assembly, schema
from jaxseg.backbones import FAMILIES, build, contract, from_json, to_json
from jaxseg.backbones.backbone import backbone
from jaxseg.data.formats import FORMATS
from jaxseg.data.source import categories_of, check_function, example_of, names_of
from jaxseg.heads import HEADS, heads_that, takes_several_maps
from jaxseg.networks import NETWORKS, Segmenter
from jaxseg.options import OptionError, options
from jaxseg.tasks import TASKS
from jaxseg.train.checkpoint import restore_frozen, save_frozen
from jaxseg.train.state import merge_params, split_params

K = 2  # logits a pixel
SIDE = 32
FLATBUFFERS = importlib.util.find_spec("flatbuffers") is not None


class Maps(nn.Module):
    """The smallest backbone with the contract: one strided convolution a map."""

    strides: tuple[int, ...] = (4,)

    @nn.compact
    def __call__(self, image):
        maps = [nn.Conv(s, (s, s), strides=s, padding="VALID")(image) for s in self.strides]
        several = {"stages": tuple(maps)} if len(maps) > 1 else {}
        return {"cls": maps[-1].mean((1, 2)), "patches": maps[-1], **several}


def small(cls) -> dict:
    """Values of the options of a class: whole numbers are halved while they are above 2 and may be."""

    def halved(value, fits):
        while type(value) is int and value > 2 and value % 2 == 0 and fits(value // 2):
            value //= 2
        return value

    def smaller(one):
        if isinstance(one.default, tuple):
            return tuple(
                halved(v, lambda x: one.fits((x,) * len(one.default))) for v in one.default
            )
        return halved(one.default, one.fits)

    return {name: smaller(one) for name, one in options(cls).items()}


def smallest(family):
    """The narrowest shape of a family."""
    return min(family.variants.values(), key=lambda shape: (shape.dim, len(shape.layer_names)))


def round_trip(task: str, **values):
    """The config of a task with values from a command line, written down and read again."""
    config = schema.base_config(task)
    given = {key.replace("__", "."): value for key, value in values.items()}
    assert schema.override(config, {k: str(v) for k, v in given.items()}) == given
    schema.validate(config)
    again = schema.modernized(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    schema.validate(again)
    return again


def section(kind: str, name: str, cls) -> dict:
    """Config values that choose `cls`, with small options."""
    own = {f"{kind}__{name}__{key}": value for key, value in small(cls).items()}
    return {f"{kind}__name": name, **own}


def check_network(network, folder, *, asks: bool = False, coarse: bool = False):
    """A network from images to `K` logits: trained and evaluated, saved and exported."""

    def fits(side):
        return network.multiple * (side // network.multiple | 1)

    square, odd = (fits(SIDE - 1),) * 2, (fits(SIDE + 1), fits(SIDE // 2 + 1))
    rng = np.random.default_rng(0)
    inputs = {"query_B": jnp.array([1, 0, 1])} if asks else {}
    one = {name: value[:1] for name, value in inputs.items()}

    def images(size):
        return rng.random((3, *size, 3), np.float32)

    @jax.jit
    def train(key, image):
        variables = network.init(key, square, **one)
        rest = {k: v for k, v in variables.items() if k != "params"}

        def loss(params):
            (logits, extras), changed = network.apply(
                {"params": params, **rest}, image, train=True, rngs={"dropout": key}, **inputs
            )
            total = sum(jnp.square(x).mean() for x in jax.tree.leaves((logits, extras)))
            return total, (logits, changed)

        gradients, (logits, changed) = jax.grad(loss, has_aux=True)(variables["params"])
        return variables, gradients, logits, changed

    variables, gradients, logits, changed = train(jax.random.key(0), images(square))
    assert logits.shape == (3, *square, K) and logits.dtype == jnp.float32
    leaves = jax.tree.leaves((variables, gradients, logits, changed))
    assert all(np.isfinite(x).all() and x.dtype == jnp.float32 for x in leaves)
    assert any(np.any(x) for x in jax.tree.leaves(gradients))
    # Batch norm, and nothing else, learns beside the parameters.
    assert jax.tree.structure({k: v for k, v in variables.items() if k != "params"}) == (
        jax.tree.structure({k: v for k, v in changed.items() if v})
    )
    assert set(variables) <= {"params", "batch_stats"}
    variables = {**variables, **changed}
    # What rests, and each layer that has a learning rate of its own, is found by these paths.
    for names in (*network.layer_names, *filter(None, [network.frozen])):
        assert jax.tree.leaves(split_params(variables["params"], names)[1]), names

    image = images(odd)
    plain = jax.jit(lambda variables, image: network.apply(variables, image, **inputs))
    evaluate = exported(plain, variables, image) if FLATBUFFERS else plain
    logits, extras = evaluate(variables, image)
    assert logits.shape == (3, *odd, K) and logits.dtype == jnp.float32
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((logits, extras)))
    if coarse:
        assert extras["coarse"].shape == (3, *(n // network.multiple for n in odd), K)
    if "auxiliary" in extras:
        assert extras["auxiliary"].shape == logits.shape
    # Each image by itself: another second one does not change what is said of the others.
    image[1] = image[0]
    again, _ = evaluate(variables, image)
    np.testing.assert_allclose(again[::2], logits[::2], atol=1e-5)

    save_frozen(folder, variables)
    restored = restore_frozen(folder, variables)
    for before, after in zip(*map(jax.tree.leaves, (variables, restored)), strict=True):
        np.testing.assert_array_equal(before, after)
    if not FLATBUFFERS:
        pytest.skip("all but jax.export, which writes with flatbuffers: pip install flatbuffers")


def exported(function, *arguments):
    """A jitted function as it is read again from one file for CPUs."""
    from jax import export

    written = export.export(function, platforms=("cpu",))(*arguments).serialize()
    return jax.jit(export.deserialize(written).call)


@pytest.mark.parametrize("name", HEADS)
def test_head(name, tmp_path):
    kind = HEADS[name]
    task = next(task for task in TASKS if name in TASKS[task].heads)
    config = round_trip(task, **section("head", name, kind))
    values = assembly.values(config.head.get(name, {}), kind)
    assert values == small(kind)
    head = kind(outputs=K, **values)
    strides = (4, 8) if takes_several_maps(head) else (4,)
    network = Segmenter(Maps(strides), head)
    assert network.multiple == strides[-1]
    asks = name in heads_that(ask=True, coarse=True)
    coarse = name not in heads_that(ask=asks, coarse=False)
    check_network(network, tmp_path, asks=asks, coarse=coarse)


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name, tmp_path):
    task = next(task for task in TASKS if TASKS[task].heads)
    config = round_trip(task, **section("network", name, NETWORKS[name]))
    network = assembly.Parts(config, ("background", "object")).network(outputs=K)
    module = network.module
    assert {field: getattr(module, field) for field in options(module)} == small(NETWORKS[name])
    check_network(network, tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_backbone(name, tmp_path):
    family = FAMILIES[name]
    assert family.name == name
    for shape_name, shape in family.variants.items():
        assert shape.name == shape_name
        assert from_json(json.loads(json.dumps(to_json(shape)))) == shape
    shape = smallest(family)
    task = next(task for task in TASKS if TASKS[task].heads)
    network = assembly.Parts(
        round_trip(task, backbone__variant=shape.name, backbone__freeze=1), ("a", "b")
    ).network(outputs=K)
    assert network.backbone.variant == shape and network.frozen and network.layer_names
    check_network(network, tmp_path)

    out = contract.outputs(build(shape))
    assert out["cls"].shape == (1, shape.dim) and out["patches"].shape[-1] == shape.dim
    with pytest.raises(OptionError, match="freeze is 999"):
        backbone(variant=shape.name, freeze=999)
    if family.from_flax is not None:
        key, image = jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3))
        params = jax.eval_shape(build(shape).init, key, image)["params"]
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), dict(params))
        tensors = family.from_flax(params, shape)
        assert [f.name for f in FAMILIES.values() if f.holds(tensors)] == [name]
        again, _, found = family.to_flax(tensors, source="", variant=shape)
        assert found == shape
        jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("name", TASKS)
def test_task(name):
    kind = TASKS[name]
    variant = smallest(next(iter(FAMILIES.values()))).name
    config = round_trip(
        name, data__size=(64, 64), data__limit=4, train__batch=2, backbone__variant=variant
    )
    source = assembly.make_data(config).split("train")
    task = assembly.make_task(config, assembly.names_in(source, name))
    task = task.bind(source, steps=2, batch=2, size=config.data.size)
    assert task.facts.size == (64, 64) and task.facts.examples == 4
    scoring = kind.scoring()
    assert task.for_validation(scoring).batch == scoring.batch
    # As it is described with the run.
    stored = assembly.stored_task(config, task.facts, task.variant)
    assert type(stored) is kind and stored.facts == task.facts

    params = jax.eval_shape(task.init, jax.random.key(0))
    trained, frozen = task.split(params)
    assert jax.tree.leaves(trained)
    extra = jax.eval_shape(task.init_extra, trained)
    reading = dataclasses.replace(assembly.make_settings(config).reading, memory_gigabytes=0)
    reader = task.reader(
        source, reading=reading, batch=2, seed=0, frozen={}, digest="", cache=False
    )
    batch = next(iter(reader.train_batches(0, 1)))

    def step(trained, frozen, extra):
        key, number = jax.random.key(0), jnp.zeros((), jnp.int32)

        def loss(trained):
            return task.loss(merge_params(trained, frozen), extra, batch, key, number)

        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
        changed, logged = task.update_extra(extra, statistics, trained, number)
        return value, gradients, changed, logged

    value, gradients, changed, logged = jax.eval_shape(step, trained, frozen, extra)
    assert value.shape == () and all(x.shape == () for x in logged.values())
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)  # noqa: E731
    assert jax.tree.all(jax.tree.map(same, gradients, trained))
    assert jax.tree.all(jax.tree.map(same, changed, extra))
    if kind.draws:
        shown = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
        for picture in jax.eval_shape(
            task.pictures, task.predicting(params, extra), shown
        ).values():
            assert picture.shape[0] == 1 and picture.shape[3] == 3 and picture.dtype == jnp.float32


@pytest.mark.parametrize("name", FORMATS)
def test_format(name):
    kind = FORMATS[name]
    readers = [task for task in TASKS if kind.gives & TASKS[task].reads]
    assert readers, f"no task reads {', '.join(kind.gives) or 'nothing'}"
    root = {} if kind.drawn else {"data__root": "somewhere"}
    chosen = {"data__name": name, **root}
    for task in readers:
        config = round_trip(task, **chosen)
        made = assembly.make_data(config)
        assert made.name == name and made.chosen.keys() == options(kind).keys()
    if kind.drawn:
        source = kind(size=(SIDE, SIDE))
        check_function(source)
        for part in ("train", "val", "test"):
            other = source.split(part)
            example = example_of(other, 0)
            assert example["image"].shape == (SIDE, SIDE, 3)
            assert categories_of(other) == categories_of(source)
            assert names_of(other) == names_of(source)
