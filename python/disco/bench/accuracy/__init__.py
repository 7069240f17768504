"""`disco bench accuracy`: the metric against the bytes exchanged, by method, over seeds."""
