"""Values without I/O: ids, zones, metadata and causes, manifests, reports, the retention policy."""
