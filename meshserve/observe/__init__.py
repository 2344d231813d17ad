"""What peers show of themselves: receipts, reports, metrics."""
