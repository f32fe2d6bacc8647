"""Jobs: a job is one model on one split; a worker trains it, a recorder stores it, and engines do many of them."""
