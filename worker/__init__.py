"""The worker process: claims jobs and runs each in a child process of its own."""
