"""Speed against other frameworks and against the machine's own limit."""
