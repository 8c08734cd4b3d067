"""The pages for people: templates and what they need, on the same functions as `app/api/`."""
