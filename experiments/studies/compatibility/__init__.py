"""Do a ControlNet and an IP-Adapter that were trained for a softmax UNet work under a student that never saw them?

The command is `mixlab compatibility`.
"""

from experiments.studies.compatibility.config import CompatibilityConfig, default_config
from experiments.studies.compatibility.page import print_summary, write_page
from experiments.studies.compatibility.run import run_compatibility

__all__ = ["CompatibilityConfig", "default_config", "print_summary", "run_compatibility", "write_page"]
