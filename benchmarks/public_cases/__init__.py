"""Toy-sized training runs of public packages, as their own documentation trains them."""
