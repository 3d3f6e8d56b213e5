"""What a run says of its privacy: statement, card and their files."""
