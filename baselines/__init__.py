"""What RPO is compared with, in the same loop: one method a file, torch only."""
