"""ONNX files of a network: grey images in, features and logits out, compared with torch before anybody gets them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rin.common.backbones import Network, scaled
from rin.common.errors import ConfigError, StateError
from rin.common.files import canonical_json
from rin.common.weights import FACTS
from rin.server.weightfiles import phantom_images

if TYPE_CHECKING:
    import onnx

TOLERANCE: Final = 1e-4  # largest difference, in units of the largest value where that is above 1
IMAGES: Final = "images"


class _Graph(nn.Module):
    """What the file computes: float (batch, 1, s, s) in 0..1 to features, and to logits where there is a head."""

    def __init__(self, network: Network, *, head: bool) -> None:
        super().__init__()
        self.network, self.with_head = network, head

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.network.features(images)
        return (features, self.network.head(features)) if self.with_head else (features,)


def write_onnx(path: Path, network: Network, *, head: bool, facts: dict[str, Any]) -> float:
    """Write `network` to `path`; the batch size is free, the normalisation is inside.

    Args:
        head: whether the head is of use, and so an output of its own.
        facts: kept as JSON under the metadata key `rin`.

    Returns:
        The largest difference from torch's values, in units of the largest value where that is above 1.

    Raises:
        ConfigError: the packages for it are not installed.
        StateError: onnxruntime gives other values than torch.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter wants it
    except ImportError as error:
        raise ConfigError(
            f"ONNX files need the package {error.name}, which is not installed", step="install rin with `rin[onnx]`"
        ) from None
    graph = _Graph(network, head=head).eval()
    size, names = network.image_size, ["features", "logits"][: 1 + head]
    with warnings.catch_warnings(action="ignore"):  # of the exporter about itself
        torch.onnx.export(
            graph,
            (torch.rand(2, 1, size, size),),
            path,
            input_names=[IMAGES],
            output_names=names,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    model = onnx.load(path)
    _strip(model)
    onnx.helper.set_model_props(model, {FACTS: canonical_json(facts).decode()})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = max(_difference(session, graph, images) for images in _samples(size))
    if not worst <= TOLERANCE:
        raise StateError(
            f"the ONNX file differs from the network by {worst:.1e}, more than {TOLERANCE:.0e}; it was not published",
            step="export another format, and report the versions of torch, onnx and onnxruntime",
        )
    return worst


def _strip(model: onnx.ModelProto) -> None:
    """Take out what the exporter notes about the machine that it ran on: paths, lines of source, names of modules."""
    model.doc_string = model.graph.doc_string = ""
    parts = [model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output]
    for part in [*parts, *model.graph.initializer, *model.functions]:
        part.doc_string = ""
        del part.metadata_props[:]
    for function in model.functions:
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]


def _samples(size: int) -> list[Tensor]:
    """Phantoms one by one and several at a time, and noise: float (n, 1, size, size) in 0..1."""
    phantoms = scaled(torch.from_numpy(phantom_images(3)), size)
    return [phantoms[:1], phantoms, torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(0))]


def _difference(session: Any, graph: _Graph, images: Tensor) -> float:
    with torch.no_grad():
        wanted = [value.numpy() for value in graph(images)]
    found: list[npt.NDArray[np.float32]] = session.run(None, {IMAGES: images.numpy()})
    return max(
        float(np.abs(ours - theirs).max() / max(1.0, float(np.abs(ours).max())))
        for ours, theirs in zip(wanted, found, strict=True)
    )
