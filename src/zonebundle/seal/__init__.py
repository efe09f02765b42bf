"""Behind the release: logs become segments, records become committed bundles."""
