"""What a backbone has learnt: k-NN, linear probe, neighbours, t-SNE, attention and PCA of its features.

Which of them are made depends on the data: classes give k-NN and the probe, masks the overlap of the
attention with the objects, and a run's own history the t-SNE over its epochs.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from jaxseg import assembly
from jaxseg import workdir as folder
from jaxseg.backbones.backbone import Backbone
from jaxseg.backbones.contract import apply, contract, init_options
from jaxseg.data.reader import Reader
from jaxseg.data.source import Source, categories_of, example_of, fit, spread, working_size
from jaxseg.evaluate import (
    attention_maps,
    features,
    knn,
    neighbors,
    probe,
    rank,
    snapshots,
)
from jaxseg.evaluate.whole_images import WholeImages
from jaxseg.ops.crops import center_crops
from jaxseg.report import features as pictures
from jaxseg.report import page
from jaxseg.report.pictures import plot_curves
from jaxseg.run import restore
from jaxseg.schema import ConfigError, validate
from jaxseg.tasks import TASKS
from jaxseg.tasks.feature_scores import MEMORY_SHARE, knn_reference, labelled
from jaxseg.train import partition
from jaxseg.train.writers import read_metrics, write_json

log = logging.getLogger(__name__)

_PICTURES = 8  # images, or queries, that are shown
_NEIGHBORS = 5
_TSNE_POINTS = 2000
_CALIBRATION = 2000  # images that the batch norm of an untrained network sees


def analyze(
    config: ml_collections.ConfigDict | None, overrides: Mapping[str, Any], workdir: Path
) -> dict[str, Any]:
    """Analyses the run in `workdir`, or the weights that `config.backbone.weights` names.

    Writes `analysis.json` and `report/analysis.html` with its pictures into the workdir.

    Args:
      config: of a pretraining task; None to analyse the run that is in the workdir.
      overrides: of the stored config, where there is a run.
      workdir: the run's folder, or a new one for weights.

    Returns:
      What is written to `analysis.json`.

    Raises:
      ConfigError: there is neither a run nor weights.
    """
    if (workdir / "config.json").exists():
        if TASKS[folder.load(workdir, overrides)[0].task].heads:
            raise ConfigError(
                f"--workdir={workdir} holds a run of segmentation; to analyse its backbone give "
                f"--config=configs/dino.py --config.backbone.weights={workdir} and a new --workdir"
            )
        run = restore(workdir, overrides)
        backbone, variables = run.task.judged_backbone(run.state)
        subject = f"the run in {workdir.name} at step {run.step}"
        at = dict(step=run.step, stored_size=run.task.facts.size)
        return _Analysis(run.config, backbone, variables, run.mesh, workdir, subject, **at).run()
    if config is None or not config.backbone.weights:
        raise ConfigError(
            f"--workdir={workdir} holds no run; to analyse weights give --config=configs/dino.py "
            "--config.backbone.weights=NAME and a new --workdir"
        )
    if TASKS[config.task].heads:
        raise ConfigError(
            f"--mode=analyze looks at backbones, and --config is of the task {config.task}: allowed "
            "are configs/dino.py and configs/rotation.py"
        )
    validate(config)
    backbone, mesh = assembly.make_backbone(config), partition.make_mesh()
    variables = {"params": backbone.params, "batch_stats": backbone.statistics}
    shardings = partition.tree_sharding(mesh, variables, config.sharding.params)
    variables = partition.put_tree(variables, shardings)
    subject = f"{config.backbone.weights}"
    return _Analysis(config, backbone, variables, mesh, workdir, subject).run()


class _Analysis:
    """Computes everything, then writes the numbers, and draws the pictures last."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        backbone: Backbone,
        variables: Mapping[str, Any],
        mesh: Mesh,
        workdir: Path,
        subject: str,
        step: int = 0,
        stored_size: tuple[int, int] | None = None,
    ):
        settings = assembly.make_settings(config)
        self.scoring, self.reading, self.seed = settings.scoring, settings.reading, settings.seed
        self.data, self.text = assembly.make_data(config), json.dumps(config.to_dict(), indent=2)
        self.backbone, self.variables = backbone, variables
        self.mesh, self.workdir, self.subject, self.step = mesh, workdir, subject, step
        self.folder = workdir / "report"
        self.held_out = self.data.split(self.scoring.split)
        asked = tuple(self.reading.size)
        self.size = working_size(self.held_out, asked, 1) if any(asked) else stored_size
        self.size = self.size or working_size(self.held_out, asked, 1)
        self.names = categories_of(self.held_out)
        self.result: dict[str, Any] = {"subject": subject, "split": self.scoring.split}
        self.pictures: dict[str, tuple[str, Callable[[Path], Any]]] = {}
        self.seen = WholeImages(
            backbone.module, backbone.normalization, self.scoring.resolution, self.scoring.crop
        )
        self.attends = "attention" in contract(backbone.module).keywords
        options = {"attention": True} if self.attends else {}

        def look(variables, image):
            out = apply(backbone.module, variables, image, train=False, **options)
            attention = {"attention": out["attention"][:, :, :1]} if options else {}
            return {"patches": out["patches"], **attention}

        self._apply = jax.jit(look, out_shardings=partition.replicated(mesh))
        # At most 32 x 32, which is CIFAR's size and enough for a baseline.
        side = (min(32, self.size[0]), min(32, self.size[1]))

        def compute(variables, batch):
            crop = self.scoring.crop
            small = center_crops(batch["image"], batch["extent"], side, share=crop)
            pixels = jnp.round(255 * small).astype(jnp.uint8).reshape(len(small), -1)
            return {**self.seen.embed(variables, batch), "pixels": pixels}

        self._gather = features.Gatherer(compute, mesh)
        # Now, so that hours of work do not end at a folder that cannot be written.
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> dict[str, Any]:
        found = self._features(self.held_out, self.variables)
        self.result["images"] = len(found["cls"])
        self.result["rankme"] = rank.rankme(found["cls"])
        self.result["embedding_std"] = rank.embedding_std(found["cls"])
        reference = knn_reference(self.data, self.scoring, self.held_out)
        if reference is not None and (found["category"] >= 0).any():
            self._classes(found, reference)
        self._neighbors(found)
        self._tsne(found)
        self._dense()
        if jax.process_index() == 0:
            self._write()
        return self.result

    def _features(self, source, variables) -> dict[str, np.ndarray]:
        """`cls` and, as a baseline, `pixels` of all images of a source."""
        batches, count = self._reader(source).spread(self.scoring.limit)
        return self._gather(variables, batches, total=count, label="features")

    def _reader(self, source: Source, batch: int = 0) -> Reader:
        return Reader(
            source,
            self.size,
            reading=self.reading,
            batch=batch or self.scoring.batch,
            seed=self.seed,
            leave_out=("mask",),
            memory_share=MEMORY_SHARE,
        )

    def _classes(self, found: Mapping[str, np.ndarray], reference: Source) -> None:
        """k-NN and linear probe, beside the same network untrained and beside raw pixels."""
        found = labelled(found)
        train = labelled(self._features(reference, self.variables))
        if not len(train["cls"]):
            return
        untrained = self._untrained(reference)
        pixels = [x["pixels"].astype(np.float32) / 255 for x in (train, found)]
        mean = pixels[0].mean(0)
        rows = {
            "backbone": (train["cls"], found["cls"]),
            "untrained": tuple(
                labelled(self._features(source, untrained))["cls"]
                for source in (reference, self.held_out)
            ),
            "pixels": tuple(x - mean for x in pixels),
        }
        labels, truth = train["category"], found["category"]
        k = min(self.scoring.k, len(labels))
        if k < self.scoring.k:
            log.warning("k-NN with k = %d: there are no more images with a class in training", k)
        options = dict(classes=len(self.names))
        near = dict(k=k, temperature=self.scoring.temperature, **options)
        table = {}
        for name, (a, b) in rows.items():
            table[name] = {
                "knn": knn.knn_accuracy(a, labels, b, truth, **near)[k],
                # The strength is chosen for the backbone; for thousands of pixels that takes long.
                "linear": probe.linear_probe(
                    a, labels, b, truth, l2=1e-1 if name == "pixels" else None, **options
                ),
                "rankme": rank.rankme(b),
            }
        self.result |= {**table["backbone"], "k": k, "train_images": len(labels), "beside": table}
        predicted = knn.knn_predict(train["cls"], labels, found["cls"], **near)[k]
        self._show(
            "confusion.png",
            "What k-NN takes for what",
            lambda path: pictures.plot_confusion(truth, predicted, self.names, path),
        )
        self._show(
            "spectrum.png",
            "Singular values of the features",
            lambda path: pictures.plot_spectrum({n: b for n, (_, b) in rows.items()}, path),
        )

    def _untrained(self, reference: Source) -> dict[str, Any]:
        """Fresh variables; batch norm's running statistics are those of some reference images."""
        module, seen = self.backbone.module, self.seen.size(self.size)
        init = jax.jit(lambda key, x: module.init(key, x, **init_options(module)))
        variables = dict(init(jax.random.key(self.seed), jnp.zeros((1, *seen, 3))))
        if not variables.get("batch_stats"):
            return variables

        @jax.jit
        def see(variables, batch):
            _, changed = apply(
                module, variables, self.seen.crops(batch), train=True, mutable=["batch_stats"]
            )
            return {**variables, **changed}

        # Whole batches alone: what fills one up would count in its statistics.
        most = min(self.scoring.batch, len(reference))
        batch = max(most // self.mesh.size * self.mesh.size, 1)
        count = min(_CALIBRATION, len(reference)) // batch * batch
        batches, _ = self._reader(reference, batch).spread(count)
        before, left = variables["batch_stats"], 1.0
        for batch in batches:
            variables = see(variables, partition.put_batch(self.mesh, batch))
            left *= 0.9  # the momentum of batch norm: what is left of the values before
        after = variables["batch_stats"]
        mean = jax.tree.map(lambda a, b: (a - left * b) / (1.0 - left), after, before)
        return {**variables, "batch_stats": mean}

    def _neighbors(self, found: Mapping[str, np.ndarray]) -> None:
        count = len(found["cls"])
        if count <= _NEIGHBORS:
            return
        labelled = self._labelled(found)
        chosen = spread(len(self.held_out), self.scoring.limit or len(self.held_out))
        everyone = np.arange(count)
        queries = spread(count, _PICTURES)
        for metric in ("cosine", "l2"):
            nearest = neighbors.nearest(found["cls"], everyone, k=_NEIGHBORS, metric=metric)
            if labelled:
                agreement = neighbors.neighbor_agreement(nearest, everyone, found["category"])
                self.result[f"neighbor_agreement_{metric}"] = agreement
            wanted = {int(i) for i in np.concatenate([queries[:, None], nearest[queries]], 1).flat}
            images = [
                example_of(self.held_out, chosen[found["index"][i]])["image"]
                if i in wanted
                else None
                for i in range(count)
            ]
            self._show(
                f"neighbors_{metric}.png",
                f"Query and nearest neighbours ({metric})",
                lambda path, images=images, nearest=nearest: pictures.plot_neighbors(
                    images,
                    queries,
                    nearest[queries],
                    path,
                    labels=found["category"] if labelled else None,
                    names=self.names,
                ),
            )

    def _labelled(self, found: Mapping[str, np.ndarray]) -> bool:
        return len(self.names) > 1 and bool((found["category"] >= 0).all())

    def _tsne(self, found: Mapping[str, np.ndarray]) -> None:
        labelled = self._labelled(found)
        picked = spread(len(found["cls"]), _TSNE_POINTS)
        size = self.seen.size(self.size)
        shown, other = [], 0
        for path in sorted((self.workdir / snapshots.FOLDER).glob("[0-9]*.npz")):
            if int(path.stem) > self.step:  # of an attempt that was cut short
                continue
            with np.load(path) as kept:
                # Since then another limit, split, size or data set may have been asked for.
                if not snapshots.same_images(kept, found, self.names, size):
                    other += 1
                    continue
                cls = kept["cls"][picked].astype(np.float32)
                category = kept["category"][picked] if labelled else None
            shown.append((f"step {int(path.stem)}", cls, category))
        if other:
            log.warning("t-SNE leaves out %d snapshots of other images than those looked at", other)
        if not shown:
            category = found["category"][picked] if labelled else None
            shown = [(self.subject, found["cls"][picked], category)]
        if len(shown[0][1]) < 10:
            return
        self._show(
            "tsne.png",
            "t-SNE of the features",
            lambda path: pictures.plot_tsne(shown, self.names if labelled else (), path),
        )

    def _dense(self) -> None:
        """PCA of the patch tokens, and attention: on a few images, and on all that have masks."""
        examples = [example_of(self.held_out, i) for i in spread(len(self.held_out), _PICTURES)]
        outputs = [self._look(example) for example in examples]
        images = [image for image, _, _, _ in outputs]
        tokens = [patches for _, patches, _, _ in outputs]
        flat = [i for i, x in enumerate(tokens) if min(x.shape[:2]) > 1]  # not of a single row
        if flat:
            self._show(
                "pca.png",
                "The first three principal components of the patch tokens as red, green and blue",
                lambda path: pictures.plot_pca(
                    [images[i] for i in flat], [tokens[i] for i in flat], path
                ),
            )
        if not self.attends:
            return
        masks = [mask for *_, mask in outputs] if outputs[0][3] is not None else None
        attentions = [attention for _, _, attention, _ in outputs]
        self._show(
            "attention.png",
            "Attention of the last block's CLS token",
            lambda path: pictures.plot_attention(images, attentions, masks, path),
        )
        if masks is None:
            return
        limit = self.scoring.limit or len(self.held_out)
        chosen = spread(len(self.held_out), limit)
        looks = [self._look(example_of(self.held_out, i))[2:] for i in chosen]
        if any(attention_maps.has_foreground(mask) for _, mask in looks):
            self.result["attention_jaccard"] = attention_maps.attention_jaccard(
                [attention for attention, _ in looks], [mask for _, mask in looks]
            )
        else:
            log.warning("no overlap of attention and objects: none of %d masks has any", len(looks))

    def _look(self, example: Mapping[str, Any]):
        """(image, patch tokens, attention [heads, h, w] or None, mask or None) of an example."""
        example = fit(dict(example), self.size, multiple=1)
        h, w = example.get("extent", example["image"].shape[:2])
        example = {k: example[k][:h, :w] for k in ("image", "mask") if k in example}
        image = np.asarray(self.seen.prepare(example["image"][None]))
        out = jax.device_get(self._apply(self.variables, image))
        patches, attention = out["patches"][0], None
        if "attention" in out:
            attention = attention_maps.cls_attention(out["attention"], patches.shape[:2])[0]
        return example["image"], patches, attention, example.get("mask")

    def _show(self, name: str, caption: str, draw: Callable[[Path], Any]) -> None:
        """Notes a picture for the page; `draw` gets its path."""
        self.pictures[name] = (caption, draw)

    def _write(self) -> None:
        print(_summary(self.result), flush=True)
        write_json(self.workdir / "analysis.json", self.result)
        captions = {}
        if plot_curves(read_metrics(self.workdir), self.folder / "curves.png"):
            captions["curves.png"] = "Training"
        for name, (caption, draw) in self.pictures.items():
            draw(self.folder / name)
            captions[name] = caption
        page.write_page(
            self.folder / "analysis.html",
            title=f"What {self.subject} has learnt",
            table=_table(self.result),
            captions=captions,
            config=self.text,
        )


def _table(result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the page's table, the first its head."""
    if "beside" not in result:
        return [["", "RankMe"], ["backbone", f"{result['rankme']:.1f}"]]
    rows = [["", f"k-NN (k = {result['k']})", "linear", "RankMe"]]
    for name, row in result["beside"].items():
        rows.append([name, f"{row['knn']:.4f}", f"{row['linear']:.4f}", f"{row['rankme']:.1f}"])
    return rows


def _summary(result: Mapping[str, Any]) -> str:
    lines = [f"{result['subject']}: {result['images']} images of {result['split']}"]
    for row in _table(result):
        lines.append("  " + row[0].ljust(12) + "".join(cell.rjust(16) for cell in row[1:]))
    for key in ("embedding_std", "neighbor_agreement_cosine"):
        if key in result:
            lines.append(f"  {key:28s} {result[key]:.4f}")
    for key in ("best_head", "mean_attention", "whole_image"):
        if "attention_jaccard" in result:
            lines.append(f"  attention_jaccard {key:15s} {result['attention_jaccard'][key]:.4f}")
    return "\n".join(lines)
