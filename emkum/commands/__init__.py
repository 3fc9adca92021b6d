"""What the `emkum` command runs, one file a command."""
