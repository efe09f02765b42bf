"""The operating system: processes, durable writes, safe walks and opens, /proc, clocks, priorities."""
