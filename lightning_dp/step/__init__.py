"""One private step: settings, plan, accumulator, release. It knows no trials, and nothing here imports lightning."""
