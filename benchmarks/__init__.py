"""What is measured, against whom; the last figures stand in README.md."""
