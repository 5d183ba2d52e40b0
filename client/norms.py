"""A site's own norm layers from round to round, where the plan says local-norms (FedBN, Li et al. 2021).

A scanner's grey values are a matter of its site, and norm layers carry them: in FedBN those layers are never averaged
into a site's network. Their change travels like every other tensor's, so that the coordinator's checkpoints hold the
mean of the sites' norm layers and stay whole: they can be scored, exported and fine-tuned, and a site that joins late
starts from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rin.common.errors import RefusedError, StateError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LocalNorms:
    """`folder/NNNNNN.safetensors`: parameters and statistics of the norm layers after round N of one run.

    A round starts with the layers of the newest round before it, so the same round again starts with the same ones.
    """

    folder: Path

    def bring(self, module: nn.Module, round: int) -> int:
        """Put the site's own layers into `module`, for round `round`; older ones are deleted.

        Returns:
            The round that they come from; 0 for a site's first, which starts from the global ones.

        Raises:
            StateError: the file is damaged.
        """
        import torch

        from rin.common.weights import read_state

        earlier = sorted(number for number in self._rounds() if number < round)
        if not earlier:
            return 0
        path = self._path(earlier[-1])
        try:
            _, found = read_state(path)
            with torch.no_grad():
                for name, value in tensors_of(module).items():
                    value.copy_(found[name])
        except (RefusedError, KeyError, RuntimeError):
            raise StateError(
                f"{path} is damaged", step="restore it from a backup; without it this site starts from the mean's norms"
            ) from None
        for number in earlier[:-1]:
            self._path(number).unlink(missing_ok=True)
        return earlier[-1]

    def keep(self, module: nn.Module, round: int) -> None:
        """Make the layers of `module` those after round `round`, durably."""
        from rin.common.weights import write_state

        write_state(self._path(round), tensors_of(module), {"round": round})

    def _path(self, round: int) -> Path:
        return self.folder / f"{round:06d}.safetensors"

    def _rounds(self) -> list[int]:
        return [int(path.stem) for path in self.folder.glob("[0-9]*.safetensors")]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the norm layers of `module`, by name; what they share memory with is the module."""
    from rin.common.norms import norm_layers

    state = module.state_dict()
    layers = norm_layers(module)
    return {name: value for name, value in state.items() if name.rpartition(".")[0] in layers}
