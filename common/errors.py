"""The error tree of rin: every error carries a code that may leave a site and a next step for the operator.

RinError
├── ConfigError      plan.toml, site.toml, a command's arguments
├── RefusedError     a site or the coordinator says no, with one of CODES
├── TransferError    weights or updates did not travel
└── StateError       a directory of rin is not in the state that the command needs
"""

from __future__ import annotations

from typing import Final

# The only words about a failure that may leave a site. The text beside a code is shown at the place where it is
# known; it never travels.
CODES: Final[dict[str, str]] = {
    "bad-request": "the request could not be read, or its protocol number is another one",
    "bad-weights": "the global weights do not match their digest or the plan's layout",
    "base-conflict": "this round was already trained from other weights",
    "budget": "the round would cross the site's privacy budget",
    "cancelled": "the coordinator or the operator cancelled the round",
    "deadline": "the round's deadline passed before training ended",
    "device": "the site's device was lost, or cannot train the plan the way it is set up",
    "disk-full": "no space is left on the device",
    "egress-refused": "the egress gate refused the update",
    "internal": "an unexpected fault; the trace is in the log of the place where it happened",
    "labels-mismatch": "the label set of the plan is not the one installed here",
    "ledger": "the site's privacy ledger is missing, damaged or not the one it was",
    "memory": "the device ran out of memory",
    "no-data": "the catalog holds no training image for the declared labels",
    "not-finite": "training gave NaN or infinite weights",
    "plan-not-accepted": "no person at the site has accepted this plan",
    "policy": "the plan is outside the site's policy",
    "round-old": "the round is older than one that was already trained",
    "trainer-away": "the trainer at the site does not answer",
    "transfer": "weights or update did not travel; the request may be repeated",
    "update-digest": "the file does not match the digest in its manifest",
    "update-duplicate": "the site already has a receipt for this round",
    "update-header": "the file's header is not the plan's",
    "update-labels": "the site's declared labels changed during the run",
    "update-late": "the round was closed before the update had arrived",
    "update-length": "the file's length is not the plan's",
    "update-manifest": "the manifest does not fit the request",
    "update-not-finite": "the update holds NaN or infinite values",
    "update-signature": "the manifest's signature is not the site's",
    "update-stranger": "the sender is not a member",
}


class RinError(Exception):
    """Base of all errors that an operator sees.

    Args:
        message: what is wrong, for the place where it happens; never sent elsewhere.
        step: the next step for the operator, an imperative sentence.
        code: one of `CODES`; the only part that may leave a site.
    """

    def __init__(self, message: str, *, step: str = "", code: str = "internal") -> None:
        super().__init__(message)
        self.message = message
        self.step = step
        self.code = code if code in CODES else "internal"

    def __str__(self) -> str:
        return f"{self.message}\n  next: {self.step}" if self.step else self.message


class ConfigError(RinError):
    """A configuration file or an argument is wrong."""


class RefusedError(RinError):
    """One side refuses; `code` says why in one of `CODES`.

    Attributes:
        note: bytes of a `rin.common.wire.SignedRefusal`, where the site's trainer has signed one; goes with the code.
    """

    def __init__(self, code: str, message: str = "", *, step: str = "", note: bytes = b"") -> None:
        super().__init__(message or CODES.get(code, code), step=step, code=code)
        self.note = note


class TransferError(RinError):
    """Weights or an update did not travel; the transfer may be tried again.

    Args:
        retry: whether the same transfer may succeed later (a cut link, a full queue) or not (a refusal).
    """

    def __init__(self, message: str, *, step: str = "", code: str = "transfer", retry: bool = True) -> None:
        super().__init__(message, step=step, code=code)
        self.retry = retry


class StateError(RinError):
    """A directory of rin is not in the state that the command needs."""


# Words of torch and its libraries; torch is not imported here. The last is all that oneDNN says when it gets no memory.
_STUCK: Final = "could not create a primitive"
_FULL: Final = ("allocate memory", "out of memory", "not enough memory", "_ALLOC_FAILED", _STUCK)
_FAILED: Final = ("CUDA error", "cuDNN error", "CUDNN_STATUS_", "CUBLAS_STATUS_", "NCCL error")
_COMPILER: Final = ("torch._dynamo", "torch._inductor")
DEVICE_STEPS: Final[dict[str, str]] = {  # what the site's operator does about them
    "memory": "raise device.memory-gib or free some memory; the coordinator asks again",
    "device": "look at the device, with nvidia-smi for a GPU; where device.compile is true, try without",
}


def device_fault(error: BaseException) -> str:
    """The code of a fault of the device, `memory` or `device`; empty for any other error."""
    if isinstance(error, MemoryError):
        return "memory"
    if not isinstance(error, RuntimeError):
        return ""
    kind, text = type(error), str(error)
    if kind.__name__ == "OutOfMemoryError" or any(words in text for words in _FULL):
        return "memory"
    failed = kind.__name__ == "AcceleratorError" or kind.__module__.startswith(_COMPILER)
    return "device" if failed or any(words in text for words in _FAILED) else ""


def kernels_stuck(error: BaseException) -> bool:
    """Whether a CPU's kernels got no memory while they were made: in this process they can never be made again."""
    return isinstance(error, RuntimeError) and _STUCK in str(error)
