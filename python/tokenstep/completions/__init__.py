"""The completions schema, and the service that turns requests in it into tokens and back."""
