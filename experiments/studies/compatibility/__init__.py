"""Whether what was made for a softmax UNet, a ControlNet or an IP-Adapter, works under a student that never saw it."""

from experiments.studies.compatibility.page import show, write_page
from experiments.studies.compatibility.run import Plan, default_plan, run_compatibility

__all__ = ["Plan", "default_plan", "run_compatibility", "show", "write_page"]
