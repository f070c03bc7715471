"""What a task is: all that `jaxseg.run` needs to train, score and apply what is learnt.

A task owns what is its own. Nothing outside `jaxseg/tasks/` asks which task it has.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import jax
from jax.sharding import Mesh

from jaxseg.backbones.backbone import Backbone
from jaxseg.data.reader import Reader, Reading
from jaxseg.data.source import Source, Splits, categories_of, working_size
from jaxseg.evaluate.scoring import Scoring
from jaxseg.networks.network import Network
from jaxseg.options import Option, OptionError
from jaxseg.train.state import merge_params, split_params


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a task is told of the training data; it is kept with the run, in `model.json`.

    Attributes:
      size: (H, W) that images are fitted into.
      categories: names of the examples' categories.
      examples: their number; 0 in runs of before it was kept.
      names: of the values in masks; () where there are none.
      class_weights: of the classes in the loss; () for equal ones.
    """

    size: tuple[int, int]
    categories: tuple[str, ...] = ("object",)
    examples: int = 0
    names: tuple[str, ...] = ()
    class_weights: tuple[float, ...] = ()


def by_bind(default: Any) -> Any:
    """A field that a task has by `bind` alone, so that it says nothing of how the task was made."""
    return dataclasses.field(default=default, compare=False)


class Parts(Protocol):
    """What a task may be made of.

    Attributes:
      names: of the values in the masks of the training data.
    """

    names: tuple[str, ...]

    def backbone(self) -> Backbone:
        """The backbone of the config."""

    def network(self, **told: int) -> Network:
        """Its network; `told` are fields of the head that follow from the data, such as `outputs`."""


class Task(abc.ABC):
    """A task; `init`, `init_extra`, `loss` and `update_extra` are those of `train.task.Learned`.

    It is made in two steps: from what a user chooses, and then by `bind`, which tells it the training
    data and the length of the run. What is made of options alone is frozen and pure.

    Attributes:
      scoring: dataclass of what it is scored by, the section `eval`.
      reads: kinds of data that it can use, see `Format.gives`.
      best_metric: the score by which the best checkpoint is chosen; the highest is the best.
      scores_untrained: whether the untrained state is scored too.
      heads: names of the heads that its networks may have; () for none.
      usual_names: of the values in masks of data that do not name them; () where they must.
      no_average: why its parameters cannot be averaged; empty where they can.
      must_be_scored: whether a run without anything to be scored on is refused before it begins.
      measures_peak: whether its training logs `share_of_peak`.
      augmented: whether its training takes an `Augmentation`.
      draws: whether `predict` writes pictures, those of `pictures`, in place of masks.
    """

    scoring: ClassVar[type[Scoring]] = Scoring
    reads: ClassVar[frozenset[str]]
    best_metric: ClassVar[str]
    scores_untrained: ClassVar[bool] = False
    must_be_scored: ClassVar[bool] = True
    measures_peak: ClassVar[bool] = False
    augmented: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    heads: ClassVar[tuple[str, ...]] = ()
    usual_names: ClassVar[tuple[str, ...]] = ()
    no_average: ClassVar[str] = ""

    # Set by `bind`.
    facts: Facts | None = None

    @classmethod
    @abc.abstractmethod
    def sections(cls) -> dict[str, Mapping[str, Option] | Option]:
        """The config's sections, and single keys, that are its own: options by name, or an option."""

    @classmethod
    @abc.abstractmethod
    def from_options(cls, parts: Parts, **sections: Any) -> Self:
        """The task of a config: of its `sections`, by name, and what it takes of `parts`."""

    # What is learned; see `train.task.Learned`.

    @abc.abstractmethod
    def init(self, rng: jax.Array) -> Mapping[str, Any]: ...

    @abc.abstractmethod
    def init_extra(self, params: Mapping[str, Any]) -> Any: ...

    @abc.abstractmethod
    def loss(self, params, extra, batch, rng, step) -> tuple[jax.Array, Any]: ...

    @abc.abstractmethod
    def update_extra(self, extra, statistics, params, step) -> tuple[Any, dict]: ...

    # Before the first step.

    def check_data(self, source: Source) -> None:
        """Looks at some examples of a source that is not one of our formats, which check themselves.

        Raises:
          DataError: they are not what the task learns from, or is scored on.
        """
        return None

    @property
    @abc.abstractmethod
    def multiple(self) -> int:
        """Sizes of images must be multiples of it."""

    def look(self, source: Source, *, size: tuple[int, int] = (0, 0)) -> Facts:
        """Looks at the training data; `size` (0, 0) means that of the images."""
        return Facts(
            working_size(source, size, self.multiple),
            categories_of(source),
            len(source),
            self._names(source),
        )

    def _names(self, source: Source) -> tuple[str, ...]:
        return ()

    def bind(
        self, source: Source, *, steps: int, batch: int, size: tuple[int, int] = (0, 0)
    ) -> Self:
        """The task for these training data and a run of `steps` on batches of `batch`."""
        return self.with_facts(self.look(source, size=size), steps=steps, batch=batch)

    @abc.abstractmethod
    def with_facts(self, facts: Facts, *, steps: int, batch: int) -> Self:
        """`bind`, from what `look` found."""

    @property
    @abc.abstractmethod
    def initial(self) -> Mapping[str, Any]:
        """Pretrained parameters, which take the place of those of `init`."""

    @property
    def frozen(self) -> tuple[str, ...]:
        """Path prefixes of the parameters that no step changes."""
        return ()

    @property
    def layer_names(self) -> tuple[tuple[str, ...], ...]:
        """Paths of parameters by layer, for learning rates by layer."""
        return ()

    @property
    def held(self) -> tuple[str, int]:
        """(beginning of the names of parameters that rest at first, for how many steps)."""
        return "", 0

    @property
    def variant(self) -> Any:
        """The shape of the backbone, where it is one of a family of ours."""
        return None

    def parameters(self, seed: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Initial (trained, frozen) parameters as host arrays, equal on every process."""
        drawn = jax.device_get(jax.jit(self.init)(jax.random.key(seed)))
        return self.split(merge_params(drawn, self.initial))

    def split(self, params: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """(trained, frozen) parts of a parameter tree."""
        return split_params(params, self.frozen)

    @abc.abstractmethod
    def learns_batch_norm(self) -> bool:
        """Whether running statistics are learned from batches, which padding would change."""

    def trained_on(self, augmentation: Any) -> Self:
        """The task with an augmentation on the device."""
        return self

    @abc.abstractmethod
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
        """What reads a source for this task.

        Args:
          source: what to read.
          reading: how.
          batch: images in a global batch.
          seed: of the order.
          frozen: host arrays of the frozen parameters; `digest` identifies them.
          augmentation: of training; None for none.
          cache: whether features may be computed once for each image.
        """

    def solve(self, reader: Reader, frozen: Mapping[str, Any]) -> Mapping[str, Any]:
        """The frozen parameters, with those that are solved for from the training data."""
        return frozen

    def watch(self, workdir: Path) -> Callable[[int, Mapping[str, float]], dict] | None:
        """What looks at every logged step, see `loop.Trainer`."""
        return None

    # Scores and predictions.

    @abc.abstractmethod
    def evaluator(
        self,
        data: Splits,
        scoring: Scoring,
        *,
        reading: Reading,
        seed: int,
        frozen: Mapping[str, Any],
        digest: str,
        mesh: Mesh,
    ) -> Callable[..., Any]:
        """`evaluate(state, frozen on the mesh, label=...) -> Evaluation` of a split.

        Raises:
          DataError: there is no such split, or something is wrong with it.
        """

    def check_scored(self, data: Splits, scoring: Scoring, *, reading: Reading) -> None:
        """Looks before the first step at what is scored in the end, not hours after it."""
        return None

    def for_validation(self, scoring: Scoring) -> Scoring:
        """How states are scored in training."""
        return scoring

    def predicting(self, params: Mapping[str, Any], extra: Any) -> Mapping[str, Any]:
        """What predictions take as `params`, from the whole parameters and the extra state."""
        return {**params, **(extra or {})}

    @property
    def masks(self) -> "Any":
        """What predicts masks: the task itself.

        Raises:
          OptionError: it predicts none.
        """
        raise OptionError(f"{type(self).__name__} predicts no masks")

    def learnt_backbone(self, params: Mapping[str, Any], extra: Any) -> Backbone:
        """The backbone with what was learnt, of the whole parameters and the extra state.

        Raises:
          OptionError: there is none.
        """
        raise OptionError(f"{type(self).__name__} has no backbone")

    def pictures(
        self, params: Mapping[str, Any], image_BxHxWx3: jax.Array
    ) -> Mapping[str, jax.Array]:
        """Pictures, float in [0, 1] `B x h x w x 3`, of uint8 images: by the ending of their files' names.

        `params` are those of `predicting`; H and W are multiples of `multiple`.

        Raises:
          OptionError: it draws none.
        """
        raise OptionError(f"{type(self).__name__} predicts no pictures")

    def judged_backbone(self, state: Any) -> tuple[Any, dict[str, Any]]:
        """(backbone, its variables) that an analysis looks at.

        Raises:
          OptionError: this task's backbone is analysed by its weights alone.
        """
        raise OptionError(f"{type(self).__name__} has no backbone of its own to analyse")
