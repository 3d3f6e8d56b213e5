"""Owners of rows: which record each row of a tensor belongs to, followed through the operations of a step."""
