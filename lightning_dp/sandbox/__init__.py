"""User code without effect: its state is put back by value, and compared and watched where it may keep something."""
