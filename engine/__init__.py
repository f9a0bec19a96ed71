"""How does it run on this machine, on many, and again tomorrow?"""
