"""What operators meet: the command line, deployment config, Ray actors and placement, lifecycle."""
