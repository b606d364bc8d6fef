"""What survives: processes are killed, doors are stormed, and what clients saw is checked afterwards."""
