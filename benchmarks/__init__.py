"""Measurements of speed, memory and quality, run by hand; none needs a download. Results: RESULTS.md."""
