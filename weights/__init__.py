"""How do public checkpoints come in and go out?"""
