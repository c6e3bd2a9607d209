"""Self-contained HTML pages: one template, style and policy for boards and for the results of commands."""
