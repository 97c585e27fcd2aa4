"""What an adapter is: the tree, what it holds at one parameter, the sites it belongs to."""
