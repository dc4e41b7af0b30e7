"""The completions schema over HTTP: FastAPI in front of one `CompletionService`."""
