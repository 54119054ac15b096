"""Raw text of any quality in, clean documents out, and a report of what was changed and dropped, and why."""
