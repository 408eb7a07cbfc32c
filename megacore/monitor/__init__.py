"""Watching a run: console and log file, metric lines, metrics.jsonl and events.jsonl, trackers, loss curves."""
