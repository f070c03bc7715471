"""The head for one asked-for class: shapes, NumPy for the course's form, and the query in charge."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxseg.heads.attention import ClassAttention

SMALL = dict(width=8, channels=8, low_channels=8, classes=3)


def _inputs(batch=2, size=(16, 24), pyramid=False, channels=6):
    rng = np.random.default_rng(0)

    def array(stride, c):
        return rng.normal(size=(batch, size[0] // stride, size[1] // stride, c)).astype(np.float32)

    features = {4: array(4, 5), 8: array(8, channels)} if pyramid else array(8, channels)
    image = rng.uniform(size=(batch, *size, 3)).astype(np.float32)
    return features, image, np.arange(batch, dtype=np.int32) % 3


def _random(head, features, image, query):
    """Variables of the right shapes and sizes; what `init` would draw takes long to compile."""
    start = partial(head.init, jax.random.key(0))
    shapes = jax.eval_shape(start, features, image, query_B=query)
    rng = np.random.default_rng(5)

    def fill(path, leaf):
        positive = path[0].key == "batch_stats" or path[-1].key == "scale"
        if positive:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 9
        return rng.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(fill, shapes)


@partial(jax.jit, static_argnums=0)
def _apply(head, variables, features, image, query):
    return head.apply(variables, features, image, query_B=query)


@pytest.mark.parametrize(
    ("pyramid", "options"),
    [
        (False, {"outputs": 1}),
        (True, {"attention": "additive"}),
        (True, {"norm": "batch"}),
        (False, {"context": "course"}),
    ],
)
def test_shapes(pyramid, options):
    head = ClassAttention(**SMALL, **options)
    features, image, query = _inputs(pyramid=pyramid)

    def run():
        variables = head.init(jax.random.key(0), features, image, query_B=query)
        return variables, head.apply(variables, features, image, query_B=query)

    variables, (logits, aux) = jax.eval_shape(run)
    assert logits.shape == (2, 16, 24, options.get("outputs", 2)) and logits.dtype == jnp.float32
    assert aux["attention"].shape == (2, 2, 3) and aux["attention"].dtype == jnp.float32
    assert ("batch_stats" in variables) == ("norm" in options)
    assert ("stem_0" in variables["params"]) == (not pyramid)


def test_images_of_any_size_with_low_level_features():
    head = ClassAttention(**SMALL)
    features, image, query = _inputs(pyramid=True)
    variables = _random(head, features, image, query)
    odd = np.zeros((2, 13, 21, 3), np.float32)
    logits, _ = jax.eval_shape(head.apply, variables, features, odd, query_B=query)
    assert logits.shape == (2, 13, 21, 2)


def test_the_image_alone_must_be_a_multiple_of_four():
    features, _, query = _inputs()
    with pytest.raises(ValueError, match="16x26"):
        _random(ClassAttention(**SMALL), features, np.zeros((2, 16, 26, 3), np.float32), query)


@pytest.mark.parametrize("query", [np.zeros((3, 1), np.int32), np.zeros(3, np.int32), np.zeros(2)])
def test_queries_that_are_not_one_integer_an_image_are_named(query):
    features, image, _ = _inputs()
    with pytest.raises(ValueError, match="expected 2 integers"):
        _random(ClassAttention(**SMALL), features, image, query)


@pytest.mark.parametrize("option", ["attention", "context", "norm"])
def test_unknown_options_are_named(option):
    with pytest.raises(ValueError, match=f"{option} is 'other': allowed are"):
        _random(ClassAttention(**(SMALL | {option: "other"})), *_inputs())


def test_several_questions_about_an_image_are_answered_one_by_one():
    features, image, query = _inputs()
    head = ClassAttention(**SMALL)
    variables = _random(head, features, image, query)
    logits, aux = _apply(head, variables, features, image, query)
    both = np.stack([query, (query + 1) % 2], 1)
    many, many_aux = _apply(head, variables, features, image, both)
    np.testing.assert_allclose(many[:, 0], logits, atol=1e-5)
    np.testing.assert_allclose(many_aux["attention"][:, 0], aux["attention"], atol=1e-6)
    other, _ = _apply(head, variables, features, image, both[:, 1])
    np.testing.assert_allclose(many[:, 1], other, atol=1e-5)


def test_encoding_once_serves_all_queries():
    head = ClassAttention(**SMALL)
    features, image, query = _inputs(pyramid=True)
    variables = _random(head, features, image, query)

    @jax.jit
    def all_queries(variables, features, image):
        encoded = head.apply(variables, features, image, method="encode")

        def decode(query):
            return head.apply(variables, encoded, query, size=(16, 24), method="decode")

        return jax.vmap(decode)(jnp.repeat(jnp.arange(3)[:, None], 2, 1))

    logits, aux = all_queries(variables, features, image)
    np.testing.assert_allclose(aux["attention"].sum((2, 3)), 1.0, atol=1e-6)
    for c in range(3):
        # One image at a time: nothing depends on the rest of the batch either.
        alone = jax.tree.map(lambda x: x[1:], (features, image))
        expected = _apply(head, variables, *alone, np.full(1, c))
        np.testing.assert_allclose(logits[c, 1:], expected[0], atol=1e-5)
        np.testing.assert_allclose(aux["attention"][c, 1:], expected[1]["attention"], atol=1e-6)
        assert np.abs(aux["attention"][c] - aux["attention"][c - 1]).max() > 1e-3


def test_training_reaches_every_parameter_and_statistic():
    head = ClassAttention(attention="additive", norm="batch", **SMALL)
    features, image, query = _inputs(pyramid=True)
    variables = _random(head, features, image, query)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(params):
        (logits, _), new = head.apply(
            variables | {"params": params},
            features,
            image,
            query_B=query,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        return ((logits - image[..., :2]) ** 2).mean(), new["batch_stats"]

    gradients, statistics = gradient(variables["params"])
    for path, grad in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-9, path
    for before, after in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(statistics), strict=True
    ):
        assert np.abs(after - before).max() > 0


def _conv_3x3(x, kernel):
    h, w, _ = x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros((h, w, kernel.shape[-1]))
    for i in range(h):
        for j in range(w):
            out[i, j] = np.einsum("abc,abco->o", padded[i : i + 3, j : j + 3], kernel)
    return out


def _bilinear(x, size):
    out = np.zeros((*size, x.shape[-1]))
    for i in range(size[0]):
        for j in range(size[1]):
            y, z = ((n + 0.5) * m / k - 0.5 for n, m, k in zip((i, j), x.shape, size))  # noqa: B905
            y, z = np.clip(y, 0, x.shape[0] - 1), np.clip(z, 0, x.shape[1] - 1)
            a, b = int(y), int(z)
            c, d = min(a + 1, x.shape[0] - 1), min(b + 1, x.shape[1] - 1)
            top = (1 - z + b) * x[a, b] + (z - b) * x[a, d]
            out[i, j] = (1 - y + a) * top + (y - a) * ((1 - z + b) * x[c, b] + (z - b) * x[c, d])
    return out


def test_the_courses_form_is_what_the_course_says():
    """One-hot, Linear, W_Q, W_K, W_V, softmax / sqrt(d), V times its weight in place, a decoder of
    the joined features with batch norm; position after position."""
    head = ClassAttention(context="course", norm="batch", **SMALL)
    features, image, _ = _inputs(batch=1, pyramid=True)
    query = np.array([2], np.int32)
    variables = _random(head, features, image, query)
    p, stats = variables["params"], variables["batch_stats"]

    def norm_relu(x, name):
        q, s = p[name]["BatchNorm_0"], stats[name]["BatchNorm_0"]
        return np.maximum((x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * q["scale"] + q["bias"], 0)

    one_hot = np.array([0, 0, 1.0])
    vector = one_hot @ p["class_query"]["kernel"] + p["class_query"]["bias"]
    asked = vector @ p["to_query"]["kernel"]
    deep, low = features[8][0], features[4][0]
    scores, values = np.zeros(deep.shape[:2]), np.zeros((*deep.shape[:2], 8))
    for i in range(deep.shape[0]):
        for j in range(deep.shape[1]):
            scores[i, j] = asked @ (deep[i, j] @ p["to_key"]["kernel"]) / np.sqrt(8)
            values[i, j] = deep[i, j] @ p["to_value"]["kernel"]
    alpha = np.exp(scores) / np.exp(scores).sum()
    attended = np.stack([[alpha[i, j] * values[i, j] for j in range(3)] for i in range(2)])
    low = norm_relu(low @ p["low"]["kernel"], "low_norm")
    joined = np.concatenate([_bilinear(attended, low.shape[:2]), low], -1)
    kernel = np.concatenate([p["join_context"]["kernel"], p["join_low"]["kernel"]], 2)
    x = norm_relu(_conv_3x3(joined, kernel), "join_norm")
    x = norm_relu(_conv_3x3(x, p["decode_conv"]["kernel"]), "decode_norm")
    expected = _bilinear(x @ p["classify"]["kernel"] + p["classify"]["bias"], image.shape[1:3])

    logits, aux = _apply(head, variables, features, image, query)
    np.testing.assert_allclose(aux["attention"][0], alpha, atol=1e-6)
    np.testing.assert_allclose(logits[0], expected, atol=1e-4)


def _scenes(rng, count, prototypes, grid=8):
    """Features with patches of two classes each, and which class is where (-1: none)."""
    place = np.full((count, grid, grid), -1)
    for scene in place:
        first, second = rng.choice(len(prototypes), 2, replace=False)
        scene[slice(*_span(rng, 0)), slice(*_span(rng, 0))] = first
        scene[slice(*_span(rng, 4)), slice(*_span(rng, rng.choice([0, 4])))] = second
    noise = rng.normal(size=(*place.shape, prototypes.shape[1]))
    features = np.where(place[..., None] >= 0, prototypes[place], 0) + 0.3 * noise
    return features.astype(np.float32), place


def _span(rng, start):
    return start + rng.integers(0, 2), start + rng.integers(2, 5)


def test_the_mask_follows_the_query():
    rng = np.random.default_rng(0)
    prototypes = rng.normal(size=(3, 12))
    head = ClassAttention(width=32, channels=16, low_channels=8, classes=3, dropout=0.0)
    blank = np.full((16, 32, 32, 3), 0.5, np.float32)

    def ask(place):
        present = [rng.choice(np.unique(scene[scene >= 0])) for scene in place]
        return np.where(rng.uniform(size=len(place)) < 0.5, present, rng.integers(0, 3, len(place)))

    def truth(place, query):
        return (place == query[:, None, None]).repeat(4, 1).repeat(4, 2)

    features, place = _scenes(rng, 16, prototypes)
    params = _random(head, features, blank, ask(place))
    optimiser = optax.adam(1e-2)

    @jax.jit
    def step(params, state, features, query, mask):
        def loss(params):
            logits, _ = head.apply(params, features, blank, query_B=query)
            labels = mask.astype(jnp.int32)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, logits

        grads, logits = jax.grad(loss, has_aux=True)(params)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(params, updates), state, logits

    state = optimiser.init(params)
    for _ in range(250):
        features, place = _scenes(rng, 16, prototypes)
        query = ask(place)
        params, state, _ = step(params, state, features, query, truth(place, query))

    features, place = _scenes(rng, 16, prototypes)
    own, other, absent = [], [], []
    for c in range(3):
        query = np.full(16, c)
        *_, logits = step(params, state, features, query, truth(place, query))
        masks = np.asarray(logits.argmax(-1) == 1)
        for scene, mask in zip(place, masks, strict=True):
            for d in range(3):
                true = (scene == d).repeat(4, 0).repeat(4, 1)
                iou = (mask & true).sum() / max((mask | true).sum(), 1)
                if true.any() and (scene == c).any():
                    (own if d == c else other).append(iou)
            if not (scene == c).any():
                absent.append(mask.mean())
    assert np.mean(own) > 0.9
    assert np.mean(other) < 0.2
    assert np.mean(absent) < 0.02
