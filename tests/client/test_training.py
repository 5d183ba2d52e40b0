from __future__ import annotations

import subprocess
import sys

CODE = """
import resource
import torch
from rin.client.training import device_answers
from rin.common.errors import kernels_stuck

torch.set_num_threads(1)
assert device_answers()
image, weight = torch.zeros(2, 4, 9, 9), torch.zeros(4, 4, 3, 3)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used - 2**20, resource.RLIM_INFINITY))
try:
    torch.nn.functional.conv2d(image, weight)
except RuntimeError as error:
    assert kernels_stuck(error), error
else:
    raise SystemExit("there was memory")
resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert not device_answers()
"""


def test_a_cpu_that_got_no_memory_for_a_kernel_is_of_no_more_use_to_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
