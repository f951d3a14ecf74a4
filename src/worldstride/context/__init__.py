"""What does the chunk remember?"""
