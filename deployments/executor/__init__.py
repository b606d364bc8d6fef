"""Runs what the gateway was asked for."""
