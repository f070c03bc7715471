"""The tensors of torchvision's DeepLabV3 as variables of our `ResNet` and `DeepLabV3`."""

from jaxseg.backbones import resnet_weights
from jaxseg.weights.tensors import Table, fill


def deeplab_to_flax(tensors):
    """Converts `backbone.*`, `classifier.*` and `aux_classifier.*`; nothing else may be there.

    Returns:
      Parameters and `batch_stats`, each {"backbone", "head"}, and the backbone's variant.
    """
    params, statistics, variant = resnet_weights.to_flax(tensors, source="drawn")
    found = {
        name: (name,)
        for name in tensors
        if not name.startswith("backbone.") and not name.endswith("num_batches_tracked")
    }
    channels = tensors["classifier.0.project.0.weight"].shape[0]
    outputs = tensors["classifier.4.weight"].shape[0]
    head = fill(tensors, found, _head(variant.dim, channels, outputs), "drawn")
    params = {"backbone": params, "head": head["params"]}
    return params, {"backbone": statistics, "head": head["batch_stats"]}, variant


def _head(dim, channels, outputs):
    table = Table()

    def point(name, path, n_out, n_in):
        """A 1x1 convolution that is a `Dense` here."""
        shape = (n_out, n_in, 1, 1)
        table[f"{name}.weight"] = (f"params/{path}/kernel", shape, lambda w: w[:, :, 0, 0].T)

    def classify(name, path, n_in):
        point(name, f"{path}classify", outputs, n_in)
        table[f"{name}.bias"] = (f"params/{path}classify/bias", (outputs,), lambda b: b)

    def point_norm(conv, norm, path, n_in):
        point(conv, f"{path}/conv", channels, n_in)
        table.norm(norm, f"{path}/norm", channels)

    pyramid = "classifier.0"
    point_norm(f"{pyramid}.convs.0.0", f"{pyramid}.convs.0.1", "aspp/point", dim)
    for i in range(3):
        name = f"{pyramid}.convs.{i + 1}"
        table.conv(f"{name}.0", f"aspp/atrous{i}/conv", channels, dim, 3)
        table.norm(f"{name}.1", f"aspp/atrous{i}/norm", channels)
    point_norm(f"{pyramid}.convs.4.1", f"{pyramid}.convs.4.2", "aspp/pool", dim)
    point_norm(f"{pyramid}.project.0", f"{pyramid}.project.1", "aspp/project", 5 * channels)
    table.conv("classifier.1", "conv/conv", channels, channels, 3)
    table.norm("classifier.2", "conv/norm", channels)
    classify("classifier.4", "", channels)
    # On the third of the four stages, half as wide as the last.
    middle = dim // 8
    table.conv("aux_classifier.0", "auxiliary/conv/conv", middle, dim // 2, 3)
    table.norm("aux_classifier.1", "auxiliary/conv/norm", middle)
    classify("aux_classifier.4", "auxiliary/", middle)
    return table
