"""What surfaces cost and how true they are, beside the peers."""
