"""What `tokenstep bench generate` runs in processes of their own; see `worker`."""
