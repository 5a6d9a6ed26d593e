"""The kernels beside what a user would call otherwise, and beside what the machine can do."""
