"""The stages: one folder a deployment."""
