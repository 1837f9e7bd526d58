"""What several tests share: seeded models, ranks in processes, peers, faults, tolerances; programs that tests start."""
