"""Private parameters as tensors that see each operation they take part in: functions of parameters, and uses."""
