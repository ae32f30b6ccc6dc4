"""The command ``hpcpar``: what one wants to know before a job, or after it, without writing a script."""
