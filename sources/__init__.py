"""Where do images and texts come from?"""
