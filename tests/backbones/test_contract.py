"""What modules of a user are taken for: the keywords and attributes that they have, and the errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.backbones import contract
from jaxseg.options import OptionError


class Plain(nn.Module):
    """Nothing but what is required."""

    stride: int = 8
    width: int = 5

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(self.width, (self.stride,) * 2, strides=self.stride, padding="VALID")(image)
        return {"cls": x.mean((1, 2)), "patches": x, "more": [x, None]}  # is left alone


class Normed(nn.Module):
    """With batch norm, dropout and a patch, whose input must be a multiple of it."""

    patch: int = 12
    normalization: str = "none"
    dtype: str = "bfloat16"
    layer_names = [["Conv_0"], ["BatchNorm_0"]]

    @nn.compact
    def __call__(self, image, *, train):
        assert image.shape[1] % self.patch == 0
        x = nn.Conv(4, (self.patch,) * 2, strides=self.patch, padding="VALID")(image)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return {"cls": x.mean((1, 2)), "patches": x}


class Anything(nn.Module):
    @nn.compact
    def __call__(self, image, **options):
        assert set(options) <= {"train"}
        x = nn.Dense(2)(image)
        return {"cls": x.mean((1, 2)), "patches": x if options.get("train") else -x}


class WithParts(nn.Module):
    """Submodules with names that the contract knows, as they are seen from inside."""

    def setup(self):
        self.patch, self.depth = nn.Dense(3), nn.Dense(3)

    def __call__(self, image):
        found = contract.contract(self)
        assert (found.patch, found.depth) == (1, 0)
        x = self.depth(self.patch(image))
        return {"cls": x.mean((1, 2)), "patches": x}


def _variables(module, size=48):
    image = jnp.zeros((1, size, size, 3))
    return module.init(jax.random.key(0), image, **contract.init_options(module))


def test_what_is_not_there_has_a_neutral_value():
    found = contract.contract(Plain())
    assert (found.patch, found.depth, found.layer_names) == (1, 0, ())
    assert (found.normalization, found.dtype, found.with_stride) == ("imagenet", jnp.float32, None)
    assert not found.keywords & {"train", "layers", "attention", "drop_keys_B"}
    assert contract.init_options(Plain()) == {}


def test_what_is_there_is_found():
    found = contract.contract(Normed())
    assert (found.patch, found.normalization, found.dtype) == (12, "none", "bfloat16")
    assert found.layer_names == (("Conv_0",), ("BatchNorm_0",))
    assert "train" in found.keywords and contract.init_options(Normed()) == {"train": False}
    assert contract.outputs(WithParts())["patches"].shape[-1] == 3


@pytest.mark.parametrize(
    ("module", "stride"),
    [(Plain(), 8), (Plain(stride=10), 10), (Plain(stride=9), 9), (Normed(), 12), (Anything(), 1)],
)
def test_the_stride_is_looked_up(module, stride):
    assert contract.stride_of(module) == stride
    out = contract.outputs(module)
    assert out["cls"].shape == (1, out["patches"].shape[-1])


def test_a_module_is_called_with_the_keywords_that_it_has():
    image = np.random.default_rng(0).random((2, 48, 48, 3), np.float32)
    every = dict(train=True, drop_keys_B=jax.random.split(jax.random.key(0), 2), layers=(-1,))
    plain = Plain()
    variables = _variables(plain)
    out, changed = contract.apply(plain, variables, image, mutable=["batch_stats"], **every)
    assert changed == {}
    np.testing.assert_array_equal(out["patches"], plain.apply(variables, image)["patches"])

    normed, rngs = Normed(), {"dropout": jax.random.key(1)}
    variables = _variables(normed)
    out, changed = contract.apply(
        normed, variables, image, mutable=["batch_stats"], rngs=rngs, **every
    )
    before, after = variables["batch_stats"], changed["batch_stats"]
    assert np.any(after["BatchNorm_0"]["mean"] != before["BatchNorm_0"]["mean"])
    rested = contract.apply(normed, variables, image, train=False)
    assert not np.array_equal(rested["patches"], out["patches"])

    # One that takes anything is told what changes what is learnt, and no more.
    anything = Anything()
    variables = _variables(anything)
    trained, rested = (
        contract.apply(anything, variables, image, **every | {"train": t}) for t in (1, 0)
    )
    np.testing.assert_array_equal(trained["patches"], -rested["patches"])


def test_a_bound_module_is_called_likewise():
    class Outer(nn.Module):
        inner: nn.Module

        def __call__(self, image):
            return contract.call(self.inner, image, train=False, attention=True)["patches"]

    image = jnp.ones((1, 48, 48, 3))
    for inner in (Plain(), Normed(), WithParts()):
        shape = jax.eval_shape(Outer(inner).init_with_output, jax.random.key(0), image)[0].shape
        assert shape[:3] == (1, *[48 // contract.stride_of(inner)] * 2)


def test_batch_norm_begins_with_mean_0_and_variance_1():
    image = jnp.zeros((1, 24, 24, 3))
    found = contract.initial_statistics(Normed(), image, train=False)
    want = _variables(Normed())["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, found, want)
    assert contract.initial_statistics(Plain(), image) == {}


def test_other_statistics_are_those_of_init():
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, image):
            self.variable("batch_stats", "seen", lambda: jnp.full(2, 7.0))
            return {"cls": image.mean((1, 2)), "patches": image}

    found = contract.initial_statistics(Counting(), jnp.zeros((1, 4, 4, 3)))
    np.testing.assert_array_equal(found["seen"], [7.0, 7.0])


class Gives(nn.Module):
    """Whatever `make` makes of the image."""

    make: object

    @nn.compact
    def __call__(self, image):
        return self.make(image)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x, "Gives gives .*; it must give cls and patches"),
        (lambda x: {"patches": x}, "gives patches; it must give cls and patches"),
        (lambda x: {"cls": x[:, 0, 0], "tokens": x}, "gives cls, tokens; it must"),
        (lambda x: {"cls": x, "patches": x}, "gives cls .*448.*; allowed: B x D and B x h x w x C"),
        (lambda x: {"cls": x[:, 0, 0], "patches": x[:, 0]}, "allowed: B x D and B x h x w x C"),
        (lambda x: {"cls": x[:, 0, 0], "patches": [x]}, "patches None; allowed: B x D"),
        (
            lambda x: {"cls": x[:, 0, 0], "patches": x[:, 1:, 1:]},
            "431x431 patches of .* 432x432; the",
        ),
        (lambda x: {"cls": x[:, 0, 0], "patches": x[:, ::2]}, "must be whole multiples of theirs"),
    ],
)
def test_what_is_no_backbone_is_named(make, message):
    with pytest.raises(OptionError, match=f"^backbone Gives.*{message}|^backbone {message}"):
        contract.outputs(Gives(make))


def test_variables_that_no_training_carries_on_are_named():
    class Cached(nn.Module):
        @nn.compact
        def __call__(self, image):
            self.variable("cache", "last", jnp.zeros, (2,))
            return {"cls": image.mean((1, 2)), "patches": image}

    with pytest.raises(
        OptionError, match="backbone Cached has variables in cache; allowed: params"
    ):
        contract.outputs(Cached())


class Asking(nn.Module):
    def __call__(self, features, image, *, query_B, size, train, temperature=1.0, **more):
        return features


class Short(nn.Module):
    def __call__(self, features):
        return features


def test_what_a_call_needs_beside_what_it_gets():
    given = ("features", "image")
    assert contract.needed(Asking(), "head", given) == ("query_B", "size")
    assert contract.needed(Plain(), "network", ("image",)) == ()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Short(),
            r"^head is Short\(self, features\); allowed: a Flax \(linen\) module that is called",
        ),
        (Short, "^head is the class Short; allowed: a Flax"),
        (lambda features, image: features, "^head is a function; allowed: a Flax"),
    ],
)
def test_what_cannot_be_called_with_it_is_named(module, message):
    with pytest.raises(OptionError, match=message):
        contract.needed(module, "head", ("features", "image"))
