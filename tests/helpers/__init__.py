"""Code that several tests share, and programs that tests start."""
