"""The user's step on chosen records: finds what one record could change that no noise covers."""
