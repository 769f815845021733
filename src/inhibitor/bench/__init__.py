"""Floor 3, the stop-watch: results that are checked before they are timed."""
