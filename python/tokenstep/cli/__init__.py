"""The ``tokenstep`` command: one file per subcommand."""
