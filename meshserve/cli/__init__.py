"""The command line: flags to config to app to exit code."""
