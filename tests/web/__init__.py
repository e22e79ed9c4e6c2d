"""A package, so that the fixtures shared by these tests end with them."""
