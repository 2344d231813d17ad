"""Tests on a LAN: a network namespace per host, real processes, real mDNS."""
