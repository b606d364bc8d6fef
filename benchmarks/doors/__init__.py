"""What is measured of the doors beside HTTP."""
