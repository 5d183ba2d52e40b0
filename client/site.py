"""site.toml: one site's own file; it never leaves the site and nothing from the coordinator can weaken it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rin.client.home import Home
from rin.common.labels import label_index
from rin.common.plan import FigureName, SiteName
from rin.common.settings import Table, read_toml


class Archive(Table):
    """Where the images and their labels come from."""

    roots: tuple[Path, ...] = ()
    labels: Path | None = None  # CSV: which image carries which local label
    mapping: Path | None = None  # CSV: local label to RadImageNet label
    layout: Literal["dicom", "radimagenet"] = "dicom"  # "radimagenet": the published PNG folders, which name the labels
    csv: tuple[Path, ...] = ()  # layout radimagenet: the published split, RadiologyAI_{train,val,test}.csv
    hold_out: bool = True  # false: an archive too small to hold patients back trains on all of them


class Labels(Table):
    """What the site declares about its labels; public to the consortium."""

    declared: tuple[str, ...] = ()
    exhaustive: tuple[str, ...] = ()  # labels whose absence on an image means negative (target = "multi")

    @model_validator(mode="after")
    def _known(self) -> Labels:
        unknown = sorted(set(self.declared + self.exhaustive) - set(label_index()))
        if unknown:
            raise ValueError(f"declared: not in the label set: {', '.join(unknown)}")
        if set(self.exhaustive) - set(self.declared):
            raise ValueError("exhaustive: may only name declared labels")
        return self

    def rows(self) -> tuple[int, ...]:
        """Head rows of the declared labels, ascending."""
        return tuple(sorted(label_index()[name] for name in set(self.declared)))

    def exhaustive_rows(self) -> tuple[int, ...]:
        return tuple(sorted(label_index()[name] for name in set(self.exhaustive)))


class Device(Table):
    """What the trainer may use."""

    name: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")] = "auto"
    threads: Annotated[int, Field(ge=1, le=256)] = 1  # fixed: two thread counts give two different sums
    processes: Annotated[int, Field(ge=1, le=64)] = 1  # that train together, one a GPU; batches are split among them
    compile: bool = False  # torch.compile: a minute or more at the start, and then faster on a GPU
    memory_gib: Annotated[float, Field(gt=0)] | None = None  # of each process
    disk_reserve_gib: Annotated[float, Field(ge=0)] = 1.0  # ingest and trainer stop before less is free

    @model_validator(mode="after")
    def _a_device_each(self) -> Device:
        if self.processes > 1 and ":" in self.name:
            raise ValueError(f'name: "{self.name}" is one GPU, and processes is {self.processes}; say "cuda"')
        return self


class Coordinator(Table):
    """Where the weights come from and go to."""

    address: Annotated[str, Field(pattern=r"^https://[A-Za-z0-9.-]+(:[0-9]{1,5})?$")] | None = None
    proxy: str | None = None  # else HTTPS_PROXY of the environment


class Policy(Table):
    """The site's own limits; the defaults are the strictest."""

    privacy: Literal["required", "none"] = "required"
    none_agreed_by: str | None = None  # with privacy = "none": who at the site agreed
    none_agreed_on: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    plans: Literal["accepted", "any"] = "accepted"  # "any": every plan within this policy
    metrics: tuple[FigureName, ...] = ()  # figures that may leave
    min_steps: Annotated[int, Field(ge=1)] = 8  # floors of non-private training (threat T8)
    min_batch: Annotated[int, Field(ge=1)] = 8
    min_patients: Annotated[int, Field(ge=1)] = 20
    min_sites: Annotated[int, Field(ge=1)] = 3
    max_rounds: Annotated[int, Field(ge=1)] = 1_000
    # Of private training. What a step does is a function of these and the plan, never of the archive (threat T5).
    patients: Annotated[int, Field(ge=1, le=10**9)] | None = None  # N as the site declares it, once, rounded down
    epsilon: Annotated[float, Field(gt=0)] = 3.0  # ceiling of all that this population's ledger holds, together
    delta: Annotated[float, Field(gt=0, lt=1e-2)] = 1e-6
    min_sigma: Annotated[float, Field(ge=0.3)] = 0.5
    max_rate: Annotated[float, Field(gt=0, le=1)] = 0.2  # probability of a patient in a step
    max_clip: Annotated[float, Field(gt=0)] = 10.0
    max_steps: Annotated[int, Field(ge=1)] = 10_000  # of a round

    @model_validator(mode="after")
    def _a_person_said_so(self) -> Policy:
        if self.privacy == "none" and not (self.none_agreed_by and self.none_agreed_on):
            raise ValueError('privacy: "none" needs none-agreed-by (a name) and none-agreed-on (a date)')
        return self


class Site(Table):
    """The whole of site.toml."""

    site: SiteName
    archive: Archive = Archive()
    labels: Labels = Labels()
    device: Device = Device()
    coordinator: Coordinator = Coordinator()
    policy: Policy = Policy()


def read_site(home: Home) -> Site:
    """The site file of `home`.

    Raises:
        ConfigError: missing or wrong; every fault at once.
    """
    return read_toml(home.site_toml, Site)
