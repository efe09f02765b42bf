"""The process that answers: configuration, zone runners, recovery, timers and wiring."""
