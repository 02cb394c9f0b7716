"""Flower: a strategy that captures, a client mod that audits before upload, and a run in one process.

Chapter `12_federated`. Needs the extra `flower`.
"""

from dager_tutorial.frameworks.flower.auditing import Auditing
from dager_tutorial.frameworks.flower.capturing import Capturing
from dager_tutorial.frameworks.flower.in_process import Failure, run_in_process

__all__ = ["Auditing", "Capturing", "Failure", "run_in_process"]
