import errno
import hashlib
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from rin.common import weights
from rin.common.backbones import initial
from rin.common.errors import RefusedError
from rin.common.layout import Layout, file_digest
from rin.common.plan import Model
from rin.common.weights import FACTS, all_finite, layout_of, read_facts, read_into, save, write_state, write_update

FACTS_OF_IT = {"round": 3, "backbone": "tiny", "sites": {"siteB": "ab", "siteA": "cd"}}


def tiny(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 2)).to(memory_format=torch.channels_last)
    net(torch.randn(2, 1, 6, 6))
    return net


def test_layout_has_floats_only_and_knows_buffers() -> None:
    kinds = {t.name: t.kind for t in layout_of(tiny(0)).tensors}
    assert kinds["1.running_mean"] == kinds["1.running_var"] == "buffer"
    assert kinds["0.weight"] == kinds["1.bias"] == "parameter"
    assert "1.num_batches_tracked" not in kinds
    assert list(kinds) == sorted(kinds)


def test_wire_file_is_the_layouts_header_and_what_safetensors_writes(tmp_path: Path) -> None:
    net = tiny(0)
    layout = layout_of(net)
    digest = save(tmp_path / "w", net, layout)
    data = (tmp_path / "w").read_bytes()
    assert data[: len(layout.header())] == layout.header()
    assert len(data) == layout.file_bytes
    layout.check(tmp_path / "w", digest)
    state = {t.name: net.state_dict()[t.name].contiguous().numpy() for t in layout.tensors}
    save_file(state, tmp_path / "library")
    assert (tmp_path / "library").read_bytes() == data


def test_wire_file_of_a_whole_backbone_equals_the_librarys(tmp_path: Path) -> None:
    net = initial(Model.model_validate({"backbone": "resnet18", "image-size": 32}), 0)
    layout = layout_of(net)
    save(tmp_path / "w", net, layout)
    save_file(load_file(tmp_path / "w"), tmp_path / "library")
    assert (tmp_path / "library").read_bytes() == (tmp_path / "w").read_bytes()
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_facts_change_the_header_but_not_the_digest(tmp_path: Path) -> None:
    net = tiny(0)
    layout = layout_of(net)
    plain = save(tmp_path / "w", net, layout)
    with_facts = save(tmp_path / "c", net, layout, facts=FACTS_OF_IT)
    assert plain == with_facts == file_digest(tmp_path / "w") == file_digest(tmp_path / "c")
    assert read_facts(tmp_path / "c") == FACTS_OF_IT
    assert read_facts(tmp_path / "w") == {}
    text = json.dumps(FACTS_OF_IT, sort_keys=True, separators=(",", ":"))
    save_file(load_file(tmp_path / "c"), tmp_path / "library", metadata={FACTS: text})
    assert (tmp_path / "library").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("facts", [None, FACTS_OF_IT])
def test_read_into_restores_every_float(tmp_path: Path, facts: dict[str, object] | None) -> None:
    net, other = tiny(0), tiny(1)
    layout = layout_of(net)
    save(tmp_path / "w", net, layout, facts=facts)
    read_into(other, tmp_path / "w", layout)
    for tensor in layout.tensors:
        assert torch.equal(net.state_dict()[tensor.name], other.state_dict()[tensor.name])


def test_update_is_local_minus_global(tmp_path: Path) -> None:
    local, start = tiny(0), tiny(1)
    layout = layout_of(local)
    save(tmp_path / "base", start, layout)
    digest = write_update(tmp_path / "update", local, tmp_path / "base", layout)
    layout.check(tmp_path / "update", digest)
    found = load_file(tmp_path / "update")
    for name, value in found.items():
        expected = local.state_dict()[name] - start.state_dict()[name]
        np.testing.assert_array_equal(value, expected.contiguous().numpy())
    assert hashlib.sha256(b"".join(found[t.name].tobytes() for t in layout.tensors)).hexdigest() == digest


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    net = tiny(0)
    save_file({"0.weight": np.zeros((3, 1, 3, 3), np.float32)}, tmp_path / "few")
    state = {t.name: np.zeros(t.shape, np.float32) for t in layout_of(net).tensors}
    save_file({**state, "0.bias": np.zeros(4, np.float32)}, tmp_path / "shape")
    save_file({**state, "0.bias": np.zeros(3, np.float64)}, tmp_path / "dtype")
    (tmp_path / "torn").write_bytes((tmp_path / "shape").read_bytes()[:50])
    for name in ("few", "shape", "dtype", "torn", "absent"):
        with pytest.raises(RefusedError) as caught:
            read_into(net, tmp_path / name)
        assert caught.value.code == "bad-weights", name


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    net = tiny(0)
    layout = layout_of(net)
    digest = save(tmp_path / "w", net, layout)
    with pytest.raises(RefusedError):
        write_update(tmp_path / "w", net, tmp_path / "absent", layout)
    assert file_digest(tmp_path / "w") == digest
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize("text", ["[]", "{", "null", '{"round": NaN}', "[" * 100_000])
def test_facts_that_are_no_json_object_are_refused(tmp_path: Path, text: str) -> None:
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "w", metadata={FACTS: text})
    with pytest.raises(RefusedError, match="no JSON object"):
        read_facts(tmp_path / "w")


def test_a_disk_that_takes_no_more_is_an_os_error_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_state(tmp_path / "w", {"a": torch.zeros(3)}, {"step": 1})
    before, limits = (tmp_path / "w").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_state(tmp_path / "w", {"a": torch.zeros(1 << 15)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    assert (tmp_path / "w").read_bytes() == before

    def full(*args: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError) as caught:
        write_state(tmp_path / "w", {"a": torch.zeros(3)}, {"step": 2})
    assert caught.value.errno == errno.ENOSPC


def test_all_finite_sees_parameters_and_buffers() -> None:
    net = tiny(0)
    assert all_finite(net)
    net.get_buffer("1.running_var")[1] = float("nan")
    assert not all_finite(net)
    net = tiny(0)
    net.get_parameter("0.weight").data[0] = float("inf")
    assert not all_finite(net)
