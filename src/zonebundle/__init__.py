"""Stop in milliseconds, keep all the evidence: bundles of a zone's state and logs, collected behind its stop."""

__version__ = "0.1.0"
