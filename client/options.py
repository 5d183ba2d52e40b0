"""What every command of rin-client is asked alike: which home, which site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rin.client.home import Home, default_root

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="The site's directory. Default: RIN_HOME, else ~/.rin.", show_default=False),
]
SiteOption = Annotated[str | None, typer.Option("--site", help="The site's name, checked against the home's.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def home_of(home: Path | None) -> Home:
    """The home that `--home` names, else the default one."""
    return Home((home or default_root()).expanduser().resolve())
