"""One private step: settings, plan, accumulator, release. Nothing here imports lightning."""
