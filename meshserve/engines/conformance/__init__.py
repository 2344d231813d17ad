"""What an engine must do, as checks that any engine can be put through: see docs/engines.md."""

from meshserve.engines.conformance.report import CHECKS, Check, Report, Result, check_engine
from meshserve.engines.conformance.subject import Promise, Subject

__all__ = ["CHECKS", "Check", "Promise", "Report", "Result", "Subject", "check_engine"]
