"""What learning without labels shares: a backbone, crops of images, and how it is judged."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones import contract
from jaxseg.backbones.backbone import Backbone
from jaxseg.backbones.backbone import backbone as make_backbone
from jaxseg.data.reader import Reader, Reading
from jaxseg.data.source import Source
from jaxseg.evaluate.scoring import FeatureScoring, Scoring
from jaxseg.options import OptionError, check, option
from jaxseg.tasks.base import Facts, Task
from jaxseg.tasks.feature_scores import FeatureEvaluator


def share(default: float, help: str = "", *, most: float = 1) -> Any:
    """An option that is a share or a probability."""
    return option(default, help, low=0, high=most)


@dataclasses.dataclass(frozen=True)
class Look:
    """How crops are changed, see `ops.crops.View`."""

    flip: float = share(0.5)
    jitter: float = share(0.8, "probability of the colour changes; their strengths follow")
    brightness: float = share(0.4)
    contrast: float = share(0.4)
    saturation: float = share(0.2)
    hue: float = share(0.1, most=0.5)
    gray: float = share(0.2)

    def shared(self) -> dict[str, float]:
        """What all crops have in common."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Look)}

    def check_scales(self) -> None:
        """Raises OptionError unless every `scale` is one."""
        for field in dataclasses.fields(self):
            low_high = getattr(self, field.name)
            if field.name.endswith("scale"):
                if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] <= 1:
                    found = "({}, {})".format(*low_high) if len(low_high) == 2 else low_high
                    raise OptionError(
                        f"views.{field.name} is {found}; allowed: 0 < low <= high <= 1"
                    )


class PretextTask(Task):
    """Trains a backbone without labels; subclasses are frozen dataclasses with these fields.

    Parameters are `{"backbone": ..., "head": ...}`.

    Attributes:
      backbone: from `jaxseg.backbone`; all of it is trained, from its weights where it has any.
      views: crops of an image.
      facts: of the training data, by `bind`.
      steps, batch: of the run, by `bind`.

    Batches hold `image` uint8 `B x H x W x 3`, `extent` int32 `B x 2` (the height and width of the
    part that is image), `row` and `valid`.
    """

    scoring: ClassVar[type[Scoring]] = FeatureScoring
    reads: ClassVar[frozenset[str]] = frozenset({"images"})
    best_metric: ClassVar[str] = "knn"
    scores_untrained: ClassVar[bool] = True
    must_be_scored: ClassVar[bool] = False
    measures_peak: ClassVar[bool] = True

    backbone: Backbone
    views: Any
    steps: int
    batch: int

    def __post_init__(self):
        made = make_backbone(self.backbone)
        object.__setattr__(self, "backbone", made)
        if made.freeze:
            kind = type(self).__name__
            raise OptionError(f"freeze is {made.freeze}; allowed for {kind}, which trains all: 0")
        check(self)
        check(self.views, "views.")
        self._check_crops()

    def _check_crops(self) -> None:
        """Raises OptionError unless the patches of the backbone divide every crop."""
        patch = contract.contract(self.backbone.module).patch
        for field in dataclasses.fields(self.views):
            size = getattr(self.views, field.name)
            if field.name.endswith("size") and size % patch:
                raise OptionError(
                    f"views.{field.name} is {size}; allowed: multiples of the patch {patch} of "
                    f"{self.backbone.name}"
                )

    @property
    def multiple(self) -> int:
        return 1

    def with_facts(self, facts: Facts, *, steps: int, batch: int) -> Self:
        return dataclasses.replace(self, facts=facts, steps=steps, batch=batch)

    @property
    def epoch_steps(self) -> float:
        """Steps in which all examples are seen once."""
        return self.facts.examples / self.batch

    @property
    def initial(self) -> Mapping[str, Any]:
        return {} if self.backbone.params is None else {"backbone": self.backbone.params}

    @property
    def variant(self) -> Any:
        return self.backbone.variant

    @property
    def module(self) -> nn.Module:
        """The backbone's module."""
        return self.backbone.module

    def _noise(self, rng: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array] | None:
        """The streams of random numbers of a module of a user; ours take a key for each image."""
        if self.variant is not None:
            return None
        # Parts of one batch must not share their noise.
        return {"dropout": jax.random.fold_in(jax.random.fold_in(rng, batch["row"][0]), 2)}

    def _example(self) -> Any:
        """An image of the largest crop."""
        return jnp.zeros((1, self._crop_size(), self._crop_size(), 3))

    @abc.abstractmethod
    def _crop_size(self) -> int:
        """Side of the largest crop."""

    def _init_backbone(self, key: Any) -> tuple[Any, Any]:
        """(what the backbone gives for `_example`, its parameters)."""
        options = contract.init_options(self.module)
        out, variables = self.module.init_with_output(key, self._example(), **options)
        return out, variables["params"]

    def _statistics(self) -> Mapping[str, Any]:
        """Running statistics that the backbone starts from."""
        options = contract.init_options(self.module)
        return self.backbone.statistics or contract.initial_statistics(
            self.module, self._example(), **options
        )

    def reader(
        self,
        source: Source,
        *,
        reading: Reading,
        batch: int,
        seed: int,
        frozen: Mapping[str, Any],
        digest: str,
        augmentation: Any = None,
        cache: bool = True,
    ) -> Reader:
        size = self.facts.size
        # Half of the memory: the held-out images take the rest.
        options = dict(reading=reading, batch=batch, seed=seed, memory_share=0.5)
        return Reader(source, size, leave_out=("mask",), **options)

    def evaluator(self, data, scoring, *, reading, seed, frozen, digest, mesh) -> FeatureEvaluator:
        size = tuple(reading.size) if any(reading.size) else self.facts.size
        options = dict(reading=reading, size=size, seed=seed, mesh=mesh)
        return FeatureEvaluator(self, data, scoring, **options)

    @abc.abstractmethod
    def backbone_variables(self, params: Mapping[str, Any], extra: Any) -> dict[str, Any]:
        """What `backbone.module.apply` takes of the network to be judged."""

    def learnt_backbone(self, params: Mapping[str, Any], extra: Any) -> Backbone:
        found = self.backbone_variables(params, extra)
        return self.backbone.with_weights(found["params"], found["batch_stats"])

    def judged_backbone(self, state: Any) -> tuple[Backbone, dict[str, Any]]:
        return self.backbone, self.backbone_variables(state.best_params, state.extra)
