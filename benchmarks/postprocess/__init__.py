"""The mask stage: quality and speed."""
