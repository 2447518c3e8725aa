"""The command line: the only place that knows arguments, environment and terminals."""
