"""The report: one HTML file with its plots in it."""
