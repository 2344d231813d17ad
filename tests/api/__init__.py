"""What clients of the HTTP APIs see: cases that run against any deployment."""
