"""What is kept of a merge and published: its record, its model card, its verification, and the upload to the Hub."""
