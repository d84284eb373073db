"""What is known of servers, who asks, and when. Knows no pool and no scope."""
