"""Many runs as one: the comparison of all position methods, the planner."""
