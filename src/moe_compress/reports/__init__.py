"""Records and the tables made from them."""
