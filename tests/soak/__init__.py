"""Long checks with commands of their own; pytest does not collect them."""
