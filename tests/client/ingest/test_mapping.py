"""Labels and mapping files: three forms, wildcards, all faults at once, nothing guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from rin.client.ingest.mapping import LocalLabel, own_names, read_labels, read_mapping
from rin.common.errors import ConfigError
from rin.common.labels import label_index

INDEX = label_index()
EDEMA, NORMAL, LIVER = INDEX["MR_brain_edema"], INDEX["MR_brain_normal"], INDEX["US_usabd_liver"]


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_three_forms_and_several_labels(tmp_path: Path) -> None:
    where = {"instance": "1.2", "series": "1.3", "number": "7", "paths": ("a/b.dcm",)}
    by_uid = read_labels(write(tmp_path / "a.csv", "sop_instance_uid,frame,label", "1.2,3,x", "1.2,,y", "9.9,,z"))
    assert by_uid.of(**where) == (LocalLabel("x", frame=3), LocalLabel("y"))
    by_number = read_labels(write(tmp_path / "b.csv", "series_uid,instance_number,label", "1.3,007,x"))
    assert by_number.of(**where) == (LocalLabel("x"),)
    by_path = read_labels(write(tmp_path / "c.csv", "label,path", "x,./a\\b.dcm"))
    assert by_path.of(**where) == (LocalLabel("x"),)
    assert by_path.of(instance="", series="", number="", paths=("b.dcm",)) == ()


@pytest.mark.parametrize(
    "header", ["uid,label", "sop_instance_uid", "", "sop_instance_uid,path,label", "path,label,colour"]
)
def test_wrong_columns_name_the_next_step(tmp_path: Path, header: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_labels(write(tmp_path / "labels.csv", header, "1,2"))
    assert "sop_instance_uid[,frame],label" in error.value.step


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.csv", "sop_instance_uid,frame,label", "1.2,0,x", ",1,x", "1.2,1,", "1.3,1,ok")
    with pytest.raises(ConfigError) as error:
        read_labels(path)
    assert [line.split(":")[1] for line in error.value.message.splitlines()] == ["2", "3", "4"]
    with pytest.raises(ConfigError, match=r"labels\.csv:2: 2 values for 3 columns"):
        read_labels(write(path, "sop_instance_uid,frame,label", "1.2,x"))
    many = write(path, "sop_instance_uid,label", *[",x"] * 50)
    with pytest.raises(ConfigError, match="and 30 more"):
        read_labels(many)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_labels(tmp_path / "missing.csv")
    (tmp_path / "latin.csv").write_bytes("path,label\na,Ödem\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_labels(tmp_path / "latin.csv")


def test_a_byte_order_mark_from_a_spreadsheet_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("path,label\na,Ödem\n", encoding="utf-8-sig")
    assert read_labels(path).of(instance="", series="", number="", paths=("a",)) == (LocalLabel("Ödem"),)


def test_the_most_specific_rows_win(tmp_path: Path) -> None:
    mapping = read_mapping(
        write(
            tmp_path / "mapping.csv",
            "modality,body_part,local_label,coding_scheme,rin_class",
            "*,*,Ödem,*,MR_brain_edema",
            "MR,BRAIN,Ödem,*,MR_brain_normal",
            "US,*,x,LOCAL,US_usabd_liver",
            "US,*,x,LOCAL,US_usabd_spleen",
            "*,*,y,RADLEX,MR_brain_edema",
        )
    )
    brain = {"modality": "MR", "body_parts": ("BRAIN", "BRAIN")}
    assert mapping.of(LocalLabel("Ödem"), **brain) == (NORMAL,)
    assert mapping.of(LocalLabel("Ödem"), modality="MR", body_parts=("", "UNKNOWN")) == (EDEMA,)
    assert mapping.of(LocalLabel("x", "local"), modality="US", body_parts=("",)) == (LIVER, INDEX["US_usabd_spleen"])
    assert mapping.of(LocalLabel("x"), modality="US", body_parts=("",))[0] == LIVER  # one scheme, not named
    assert mapping.of(LocalLabel("y", "SNOMED"), **brain) == ()
    for unknown in ("ödem", "x ", "Edema"):  # never guessed: not even by case
        assert mapping.of(LocalLabel(unknown), **brain) == ()


def test_unknown_classes_of_a_mapping_are_all_listed(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mapping.csv",
        "modality,body_part,local_label,coding_scheme,rin_class",
        "*,*,a,*,MR_brain_oedema",
        "*,*,,*,MR_brain_edema",
        "*,*,b,*,",
    )
    with pytest.raises(ConfigError) as error:
        read_mapping(path)
    assert len(error.value.message.splitlines()) == 3
    with pytest.raises(ConfigError, match="the columns are a,b"):
        read_mapping(write(path, "a,b", "1,2"))


def test_own_names_map_to_themselves() -> None:
    assert own_names().of(LocalLabel("MR_brain_edema"), modality="MR", body_parts=()) == (EDEMA,)
    assert own_names().of(LocalLabel("edema"), modality="MR", body_parts=()) == ()
