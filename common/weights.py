"""Networks to weight files and back: safetensors in the plan's layout, streamed tensor by tensor."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rin.common.errors import RefusedError
from rin.common.files import canonical_json, fsync_dir
from rin.common.layout import Layout

FACTS: Final = "rin"  # the one metadata key of a checkpoint
OS_ERROR: Final = re.compile(r"\(os error (\d+)\)")  # in the words of safetensors


def layout_of(module: nn.Module) -> Layout:
    """Layout of `module`: its parameters and its persistent float buffers; integer buffers never travel."""
    parameters = dict(module.named_parameters())
    return Layout.of(
        (name, tuple(value.shape), "parameter" if name in parameters else "buffer")
        for name, value in module.state_dict().items()
        if value.is_floating_point()
    )


def save(path: Path, module: nn.Module, layout: Layout, *, facts: dict[str, Any] | None = None) -> str:
    """Write the weights of `module` to `path`, atomically.

    Args:
        facts: what a checkpoint says about itself, as JSON; None writes the wire form, with no metadata at all.

    Returns:
        Hex SHA-256 of the tensor bytes; it does not depend on `facts`.
    """
    state = module.state_dict()
    return write_tensors(path, layout, (_host(state[tensor.name]) for tensor in layout.tensors), facts=facts)


def write_update(
    path: Path, module: nn.Module, base: Path, layout: Layout, *, between: Callable[[], None] = lambda: None
) -> str:
    """Write local minus global to `path`, atomically; `base` is the weight file that training started from.

    Args:
        between: called before each tensor; what it raises ends the work, and nothing is written.

    Returns:
        Hex SHA-256 of the tensor bytes.
    """
    state = module.state_dict()

    def differences(file: Any) -> Iterator[npt.NDArray[np.float32]]:
        for tensor in layout.tensors:
            between()
            yield _host(state[tensor.name]) - file.get_tensor(tensor.name).numpy()

    with _opened(base) as file:
        return write_tensors(path, layout, differences(file))


def write_tensors(
    path: Path, layout: Layout, tensors: Iterable[npt.NDArray[np.float32]], *, facts: dict[str, Any] | None = None
) -> str:
    """Write `tensors`, in the order of `layout`, to `path`; fsync, then rename. Returns their digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sha = hashlib.sha256()
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(layout.header() if facts is None else header_with(layout, facts))
            _write_all(file, layout, tensors, sha.update)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
    fsync_dir(path.parent)
    return sha.hexdigest()


def _write_all(file: IO[bytes], layout: Layout, tensors: Iterable[npt.NDArray[np.float32]], update: Any) -> None:
    for tensor, values in zip(layout.tensors, tensors, strict=True):
        data = np.ascontiguousarray(values, dtype="<f4")
        if data.nbytes != tensor.nbytes:
            raise ValueError(f"{tensor.name}: {data.shape} is not {tensor.shape}")
        update(data.data)
        file.write(data.data)


def header_with(layout: Layout, facts: dict[str, Any]) -> bytes:
    """The layout's header with `facts` as sorted JSON under the metadata key `rin`."""
    plain = layout.header()
    entries = json.loads(plain[8:])
    entries = {"__metadata__": {FACTS: canonical_json(facts).decode()}, **entries}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_into(module: nn.Module, path: Path, layout: Layout | None = None) -> None:
    """Copy the weights at `path`, a wire file or a checkpoint, into `module`.

    Raises:
        RefusedError: bad-weights, if the file is not of the module's layout (or of `layout`, where it is given).
    """
    layout = layout or layout_of(module)
    state = module.state_dict()
    with _opened(path) as file, torch.no_grad():
        if set(file.keys()) != {tensor.name for tensor in layout.tensors}:
            raise RefusedError("bad-weights", f"{path.name} holds other tensors than the plan's network")
        for tensor in layout.tensors:
            found = file.get_slice(tensor.name)
            if found.get_dtype() != "F32" or tuple(found.get_shape()) != tensor.shape:
                raise RefusedError("bad-weights", f"{path.name}: {tensor.name} is not float32 {tensor.shape}")
            state[tensor.name].copy_(file.get_tensor(tensor.name))


def read_facts(path: Path) -> dict[str, Any]:
    """What the checkpoint at `path` says about itself; empty for a wire file.

    Raises:
        RefusedError: bad-weights, if the file cannot be read.
    """
    with _opened(path) as file:
        text = (file.metadata() or {}).get(FACTS, "{}")
    return parse_facts(path, text)


def parse_facts(path: Path, text: str) -> dict[str, Any]:
    """`text`, which the metadata of the file at `path` holds, as facts; any file may say anything.

    Raises:
        RefusedError: bad-weights, if it is no JSON object, or holds NaN or infinity, which no JSON of ours can hold.
    """

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        facts = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise RefusedError("bad-weights", f"{path.name}: its facts are no JSON object")
    return facts


def write_state(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors of any kind and what they are, for this program to go on from; atomically.

    Raises:
        OSError: what the disk says; ENOSPC if it is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(fd)
    part = Path(name)
    try:
        whole = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
        with _os_errors(path):
            save_file(whole, part, metadata={FACTS: canonical_json(facts).decode()})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """What the library says of the disk, as Python's own error for it: the library has one error for everything."""
    try:
        yield
    except SafetensorError as error:
        if (found := OS_ERROR.search(str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of `write_state`.

    Raises:
        RefusedError: bad-weights, if the file is missing or damaged.
    """
    facts = read_facts(path)
    with _opened(path) as file:
        return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The safetensors file at `path`, with the library's errors as ours."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise RefusedError("bad-weights", f"{path.name} is no readable weight file") from error


def _host(value: Tensor) -> npt.NDArray[np.float32]:
    """`value` as a contiguous float32 array in row-major order, whatever its device and memory format."""
    return value.detach().to("cpu", torch.float32).contiguous().numpy()


def all_finite(module: nn.Module) -> bool:
    """Whether every parameter and float buffer of `module` is finite."""
    checks = [value.isfinite().all() for value in module.state_dict().values() if value.is_floating_point()]
    return bool(torch.stack(checks).all())
