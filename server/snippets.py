"""Code for a model card: how to load an exported file with nothing but its own library, as text that runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rin.common.backbones import BACKBONES
from rin.common.keylayouts import CHILDREN
from rin.common.labels import label_set

# How the stock networks are made, with {classes} for the head.
STOCK: Final[dict[str, tuple[str, str]]] = {
    "resnet18": ("from torchvision.models import resnet18", "resnet18(num_classes={classes})"),
    "resnet50": ("from torchvision.models import resnet50", "resnet50(num_classes={classes})"),
    "densenet121": ("from torchvision.models import densenet121", "densenet121(num_classes={classes})"),
    "inception_v3": (
        "from torchvision.models import inception_v3",
        "inception_v3(num_classes={classes}, aux_logits=False, init_weights=False)",
    ),
    "inception_resnet_v2": (
        "from timm.models.inception_resnet_v2 import InceptionResnetV2",
        "InceptionResnetV2(num_classes={classes})",
    ),
    "swin_t": ("from torchvision.models import swin_t", "swin_t(num_classes={classes})"),
}

RIN: Final = """\
With rin:

```python
from pathlib import Path
from rin.common.formats import network_of, read

network = network_of(read(Path("{file}")))
features = network.features(images)  # images: uint8 tensor (n, height, width), grey
```"""

TORCHVISION: Final = """\
With {library} alone:

```python
import torch
{imports}

network = {make}
{without}network.load_state_dict(torch.load("{file}", weights_only=True), strict=True)
network.eval()
mean = torch.tensor({mean}).view(1, 3, 1, 1)
deviation = torch.tensor({deviation}).view(1, 3, 1, 1)
x = images.unsqueeze(1).float() / 255  # images: uint8 tensor (n, {size}, {size}), grey
{output} = network((x - mean) / deviation)
```"""

RADIMAGENET: Final = """\
As RadImageNet's PyTorch release is loaded:

```python
import torch
{imports}


class Backbone(torch.nn.Module):
    def __init__(self):
        super().__init__()
        network = {make}
        self.backbone = torch.nn.Sequential(*list(network.children())[:{children}])

    def forward(self, x):
        return self.backbone(x)


network = Backbone()
network.load_state_dict(torch.load("{file}", weights_only=True), strict=True)
network.eval()
x = images.unsqueeze(1).float() / 255  # images: uint8 tensor (n, {size}, {size}), grey
mean = torch.tensor({mean}).view(1, 3, 1, 1)
deviation = torch.tensor({deviation}).view(1, 3, 1, 1)
maps = network((x - mean) / deviation){after}
```"""

ONNX: Final = """\
With onnxruntime:

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
x = np.asarray(images, np.float32)[:, None] / 255  # images: uint8 (n, {size}, {size}), grey
{output} = session.run(None, {{"images": x}})
```"""

TEXTS: Final = {"safetensors": RIN, "torchvision": TORCHVISION, "radimagenet": RADIMAGENET, "onnx": ONNX}


def snippet(format: str, file: str, facts: Mapping[str, Any], *, head: bool) -> str:
    """Markdown that shows how `file` is loaded.

    Args:
        facts: `Weights.all_facts()`.
        head: whether the file holds a head (RadImageNet's layout never does).
    """
    imports, make = STOCK.get(facts["backbone"], ("", ""))
    classifier = BACKBONES[facts["backbone"]].classifier
    outputs = {"onnx": ("features, logits" if head else "(features,)"), "torchvision": "logits" if head else "features"}
    return TEXTS[format].format(
        file=file,
        library="timm" if "timm" in imports else "torchvision",
        imports=imports,
        make=make.format(classes=len(label_set()) if head and format == "torchvision" else 1000),
        without="" if head else f"network.{classifier} = torch.nn.Identity()\n",
        children=CHILDREN.get(facts["backbone"], 0),
        after="  # before the last ReLU and pooling" if facts["backbone"] == "densenet121" else "",
        mean=facts["mean"],
        deviation=facts["deviation"],
        size=facts["image_size"],
        output=outputs.get(format, ""),
    )
