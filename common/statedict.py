"""State dicts from files, safetensors or torch.save: tensors only, never a pickle that could run code."""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rin.common.errors import RefusedError
from rin.common.weights import FACTS, parse_facts

HDF5: Final = b"\x89HDF\r\n\x1a\n"
KERAS: Final = (
    "is a Keras (HDF5) file. RadImageNet's Keras ResNet50 is version 1 (stride on the 1x1 convolution, biases, other "
    "epsilons), torchvision's is version 1.5: the same numbers in that network would give wrong features"
)
KERAS_STEP: Final = "use the PyTorch files of the same release: ResNet50.pt, DenseNet121.pt, InceptionV3.pt"
SAVE_STEP: Final = "save `network.state_dict()` with safetensors or torch.save"
DAMAGED: Final = (  # what torch's reader and the pickle below it raise at a byte that is not what it was
    *(RuntimeError, ValueError, LookupError, EOFError, AttributeError, TypeError, OSError, struct.error),
    *(AssertionError, ArithmeticError, MemoryError),
)
WRAPPERS: Final = ("state_dict", "model_state_dict", "model")  # what training scripts keep a state dict under


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor of the file at `path` by its name, on the CPU, and rin's facts where it has them.

    The bytes decide what the file is, its name does not matter.

    Raises:
        RefusedError: bad-weights: missing, damaged, Keras, or a pickle that holds more than tensors.
    """
    try:
        with path.open("rb") as file:
            first = file.read(16)
    except OSError:
        raise RefusedError("bad-weights", f"{path.name} cannot be read", step="check the path") from None
    if first.startswith(HDF5):
        raise RefusedError("bad-weights", f"{path.name} {KERAS}", step=KERAS_STEP)
    if first[8:9] == b"{":
        return _from_safetensors(path)
    if first.startswith((b"PK\x03\x04", b"\x80")):
        return _from_torch(path), {}
    raise RefusedError(
        "bad-weights", f"{path.name} is neither a safetensors file nor one of torch.save", step=SAVE_STEP
    )


def _from_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(FACTS, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError):
        raise RefusedError("bad-weights", f"{path.name} is no readable safetensors file") from None
    return tensors, parse_facts(path, text)


def _from_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd pickles, which are then read or refused
            value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise RefusedError(
            "bad-weights",
            f"{path.name} is no intact file of tensors: it is damaged, or holds Python objects that could run code",
            step=SAVE_STEP,
        ) from None
    # torch's reader has no error of its own: a damaged file ends in whatever line met it
    except DAMAGED as error:
        raise RefusedError(
            "bad-weights", f"{path.name} cannot be read as a file of torch.save ({type(error).__name__})"
        ) from None
    for key in WRAPPERS:
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    good = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    if not good or not all(_plain(each) for each in value.values()):
        raise RefusedError(
            "bad-weights", f"{path.name} holds no state dict, which is names with tensors", step=SAVE_STEP
        )
    return dict(value)


def _plain(value: Any) -> bool:
    """Whether it is a tensor of values in memory: neither sparse nor quantised nor without data."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_quantized or value.is_meta)
