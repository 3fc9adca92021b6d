"""Energy that a machine takes, from the counters that it lets one read."""

import shutil
import subprocess
import time
from pathlib import Path

CPU, GPU = "cpu", "gpu"
_POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Energy of the whole machine, other work on it included, since this was made.

    CPU packages by Intel's and AMD's RAPL counters; GPUs by the power that `nvidia-smi` tells each time it is asked,
    taken for that of the time since it was asked last.

    Args:
        powercap: folder of the counters.
    """

    def __init__(self, powercap: Path = _POWERCAP) -> None:
        self._joules: dict[str, float] = {}
        # intel-rapl:0 is a package, intel-rapl:0:0 a part of it.
        self._counters = {
            folder: value
            for folder in sorted(powercap.glob("intel-rapl:*"))
            if folder.name.count(":") == 1 and (value := _number(folder / "energy_uj")) is not None
        }
        self._asked = time.monotonic()
        if self._counters:
            self._joules[CPU] = 0.0
        if shutil.which("nvidia-smi") and _gpu_watts() is not None:
            self._joules[GPU] = 0.0

    def joules(self) -> dict[str, float]:
        """Joules by source, CPU and GPU, of those that can be read."""
        for folder, last in self._counters.items():
            value = _number(folder / "energy_uj")
            if value is None:
                continue
            # A counter begins anew at its end.
            length = _number(folder / "max_energy_range_uj") or 0
            self._joules[CPU] += (value - last if value >= last else value + length - last) / 1e6
            self._counters[folder] = value
        if GPU in self._joules:
            now = time.monotonic()
            self._joules[GPU] += (_gpu_watts() or 0.0) * (now - self._asked)
            self._asked = now
        return dict(self._joules)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _gpu_watts() -> float | None:
    """Power of all GPUs together; None where it cannot be read."""
    query = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return sum(float(line) for line in text.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
