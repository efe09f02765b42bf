"""The hold: probes, commands and the snapshot, under a budget, while the zone waits."""
