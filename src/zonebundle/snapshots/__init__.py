"""One instant of a zone's filesystem: one protocol, and a module for each way to hold it."""
